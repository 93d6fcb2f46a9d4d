"""A lone pair beside a request of 10,000 candidates: it must not wait for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import httpx

from benchmarks.harness.server import WatchedServer
from benchmarks.reliability import checks, setup, traffic
from benchmarks.reliability.checks import Check, Report
from benchmarks.reliability.light_client import Wire
from benchmarks.reliability.traffic import Question

_PAUSE = 0.02  # seconds between pairs: they come one by one, as from a person's tool


def crowded(candidates: int, pairs: int) -> Report:
    """Times lone pairs on an idle server, and on one that works through a huge request.

    Args:
        candidates: Of the huge request.
        pairs: How many are timed on the idle server.
    """
    path, _ = setup.model_paths()
    asked = traffic.questions([setup.reference(path)], 64, candidates=2, characters=200)
    with WatchedServer(["--model", str(path), *setup.COMPUTED], setup.WORK / "crowded.log") as server:
        idle, crowd, step, seconds = asyncio.run(_measure(server, asked, candidates, pairs))
    p95_idle, p95_crowd = checks.percentile(idle, 0.95), checks.percentile(crowd, 0.95)
    most = 3 * p95_idle + step
    return Report(
        "A lone pair beside a huge request",
        f"python -m benchmarks.reliability crowded --candidates {candidates} --pairs {pairs}",
        {
            "idle": f"{len(idle):,} pairs one by one: median {_ms(checks.percentile(idle, 0.5))}, p95 {_ms(p95_idle)}",
            "crowded": f"{len(crowd):,} pairs while {candidates:,} candidates took {seconds:.1f} s: "
            f"median {_ms(checks.percentile(crowd, 0.5))}, p95 {_ms(p95_crowd)}, longest {_ms(max(crowd))}",
            "step": f"{_ms(step)}, the average of such a request's steps while it is alone",
        },
        [
            Check(
                "p95 of a lone pair below 3 times its idle p95 plus one step",
                f"{_ms(p95_crowd)} of {_ms(most)}",
                p95_crowd < most,
            )
        ],
    )


async def _measure(
    server: WatchedServer, asked: Sequence[Question], candidates: int, pairs: int
) -> tuple[list[float], list[float], float, float]:
    async with traffic.client(server.url, 600) as http, Wire(server.url, 600) as wire:
        await _timed(wire, asked, 20)  # connections and caches
        idle = await _timed(wire, asked, pairs)
        step = await _step_of_many(server, http, asked, candidates // 5)
        started = time.perf_counter()
        huge = asyncio.create_task(_ask_for_many(http, asked, candidates))
        crowd: list[float] = []
        while not huge.done():
            crowd += await _timed(wire, asked, 1)
        await huge
        seconds = time.perf_counter() - started
    return idle, crowd, step, seconds


async def _step_of_many(
    server: WatchedServer, http: httpx.AsyncClient, asked: Sequence[Question], candidates: int
) -> float:
    """Returns the average seconds of a step of such a request while it is alone: what a pair may find running."""
    before = server.steps
    await _ask_for_many(http, asked, candidates)
    after = server.steps
    return (after[0] - before[0]) / (after[1] - before[1])


async def _timed(wire: Wire, asked: Sequence[Question], count: int) -> list[float]:
    seconds = []
    for number in range(count):
        await asyncio.sleep(_PAUSE)
        now = time.perf_counter()
        outcome = await traffic.ask(wire, asked[number % len(asked)], planned=now, start=now)
        if outcome.status != 200 or outcome.fault:
            raise RuntimeError(f"A lone pair failed: {outcome}")
        seconds.append(outcome.seconds)
    return seconds


async def _ask_for_many(http: httpx.AsyncClient, asked: Sequence[Question], candidates: int) -> None:
    texts = [prompt["candidates"] for question in asked for prompt in question.body["prompts"]]
    flat = [text for pair in texts for text in pair]
    prompt = {
        "prompt": asked[0].body["prompts"][0]["prompt"],
        "candidates": [f"{flat[number % len(flat)]} {number}" for number in range(candidates)],
    }
    (await http.post("/best-of-n", json={"prompts": [prompt], "top_k": 1})).raise_for_status()


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
