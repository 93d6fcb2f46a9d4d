"""Lone pairs beside a request of 10,000 candidates: they must not wait for it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence

from benchmarks.reliability import checks, traffic
from benchmarks.reliability.light_client import LightClient
from benchmarks.reliability.report import Check, Report
from benchmarks.reliability.server import COMPUTED, WORK, WatchedServer, model_paths, reference
from benchmarks.reliability.traffic import CheckedRequest

_PAUSE = 0.02  # seconds between pairs, as from an interactive tool


def crowded(candidates: int, pairs: int) -> Report:
    """Times lone pairs on an idle server, and on a server that computes a huge request.

    Args:
        candidates: Candidates of the huge request.
        pairs: Pairs on the idle server.
    """
    path, _ = model_paths()
    requests = traffic.checked_requests([reference(path)], 64, candidates=2, characters=200)
    with WatchedServer(["--model", str(path), *COMPUTED], WORK / "crowded.log") as server:
        idle, beside, step, seconds = asyncio.run(_measure(server, requests, candidates, pairs))
    p95_idle, p95_beside = checks.percentile(idle, 0.95), checks.percentile(beside, 0.95)
    most = 3 * p95_idle + step
    return Report(
        "A lone pair beside a huge request",
        f"python -m benchmarks.reliability crowded --candidates {candidates} --pairs {pairs}",
        {
            "idle": f"{len(idle):,} pairs one by one: median {_ms(checks.percentile(idle, 0.5))}, p95 {_ms(p95_idle)}",
            "beside it": f"{len(beside):,} pairs while {candidates:,} candidates took {seconds:.1f} s: "
            f"median {_ms(checks.percentile(beside, 0.5))}, p95 {_ms(p95_beside)}, longest {_ms(max(beside))}",
            "step": f"{_ms(step)}, the mean of such a request's steps on an idle server",
        },
        [
            Check(
                "p95 of a lone pair below 3 times its idle p95 plus one step",
                f"{_ms(p95_beside)} of {_ms(most)}",
                p95_beside < most,
            )
        ],
    )


async def _measure(
    server: WatchedServer, requests: Sequence[CheckedRequest], candidates: int, pairs: int
) -> tuple[list[float], list[float], float, float]:
    async with LightClient(server.url, 600) as client:
        await _timed(client, requests, 20)  # opens connections and fills caches
        idle = await _timed(client, requests, pairs)
        step = await _mean_step(server, client, requests, candidates // 5)
        started = time.perf_counter()
        huge = asyncio.create_task(_send_huge(client, requests, candidates))
        beside: list[float] = []
        while not huge.done():
            beside += await _timed(client, requests, 1)
        await huge
        seconds = time.perf_counter() - started
    return idle, beside, step, seconds


async def _mean_step(
    server: WatchedServer, client: LightClient, requests: Sequence[CheckedRequest], candidates: int
) -> float:
    """Returns the mean seconds of a step of such a request: a pair may arrive at the start of one."""
    before = server.steps
    await _send_huge(client, requests, candidates)
    after = server.steps
    return (after[0] - before[0]) / (after[1] - before[1])


async def _timed(client: LightClient, requests: Sequence[CheckedRequest], count: int) -> list[float]:
    seconds = []
    for number in range(count):
        await asyncio.sleep(_PAUSE)
        now = time.perf_counter()
        outcome = await traffic.send(client, requests[number % len(requests)], planned=now, start=now)
        if outcome.status != 200 or outcome.fault:
            raise RuntimeError(f"A lone pair failed: {outcome}")
        seconds.append(outcome.seconds)
    return seconds


async def _send_huge(client: LightClient, requests: Sequence[CheckedRequest], candidates: int) -> None:
    texts = [prompt["candidates"] for request in requests for prompt in request.body["prompts"]]
    flat = [text for pair in texts for text in pair]
    prompt = {
        "prompt": requests[0].body["prompts"][0]["prompt"],
        "candidates": [f"{flat[number % len(flat)]} {number}" for number in range(candidates)],
    }
    body = json.dumps({"prompts": [prompt], "top_k": 1}).encode()
    reply = await client.post("/best-of-n", body)
    if reply.status != 200:
        raise RuntimeError(f"The huge request failed: {reply.status} {reply.body.decode()}")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
