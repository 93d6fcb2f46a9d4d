"""Open-loop load above what the server can do: it must answer what it accepts in time, and refuse the rest politely."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reliability import checks, setup, traffic
from benchmarks.reliability.checks import Check, Outcome, Report
from benchmarks.reliability.server import WatchedServer
from benchmarks.reliability.traffic import Question

_CAPACITY_SECONDS = 20.0


def overload(minutes: float, times: float, deadline: float) -> Report:
    """Runs the server at its capacity and at a multiple of it.

    Args:
        minutes: How long at the multiple; a third as long, at least 30 s, at capacity.
        times: The multiple.
        deadline: Seconds within which an answer is worth something; each request says so.
    """
    path, _ = setup.model_paths()
    asked = traffic.questions([setup.reference(path)], 64)
    tokens = _tokens_per_request(path, asked)
    base = ["--model", str(path), *setup.COMPUTED]
    seconds = minutes * 60
    with WatchedServer(base, setup.WORK / "capacity.log") as server:
        rate = asyncio.run(traffic.capacity(server.url, asked, min(_CAPACITY_SECONDS, seconds)))
    with WatchedServer(base, setup.WORK / "overload.log") as server:
        cpu = [server.cpu_seconds]
        at_one = asyncio.run(_load(server.url, asked, rate, max(30.0, seconds / 3), deadline))
        cpu.append(server.cpu_seconds)
        server.rss.clear()
        started = time.perf_counter()
        outcomes, sent = asyncio.run(_load(server.url, asked, rate * times, seconds, deadline))
        took = time.perf_counter() - started
        cpu.append(server.cpu_seconds)
        rss = list(server.rss)
    accepted = [outcome.seconds for outcome in outcomes if outcome.status == 200]
    p99 = checks.percentile(accepted, 0.99)
    once = checks.goodput(at_one[0], deadline, max(30.0, seconds / 3))
    several = checks.goodput(outcomes, deadline, seconds)
    facts = {
        "capacity": f"{rate:.1f} requests/s (closed loop of 16), each 8 candidates and about {tokens:.0f} tokens",
        "load": f"{times:g} times that, {sent:,} requests in {seconds:.0f} s (Poisson), all answered after {took:.0f} s",
        "deadline": f"{deadline:g} s, as X-Request-Timeout; the queue has its default bounds",
        "the server's CPU time for each right answer": f"{_cpu(cpu[0], cpu[1], at_one[0])} at 1x, "
        f"{_cpu(cpu[1], cpu[2], outcomes)} at {times:g}x",
    }
    return Report(
        f"Overload, {times:g} times capacity",
        f"python -m benchmarks.reliability overload --minutes {minutes:g} --times {times:g} --deadline {deadline:g}",
        facts,
        [
            checks.answered_once(outcomes, sent),
            checks.only_statuses(outcomes, {200, 429, 503}),
            checks.right_rewards(outcomes, len(accepted)),
            Check("p99 of the accepted under the deadline", f"{p99:.2f} s of {deadline:g} s", p99 < deadline),
            checks.flat_memory(rss, 0.05),
            Check(
                f"goodput at {times:g}x at least 90% of that at 1x",
                f"{several:.1f} against {once:.1f} requests/s: {several / max(once, 1e-9):.0%}",
                several >= 0.9 * once,
            ),
        ],
    )


async def _load(
    url: str, asked: Sequence[Question], rate: float, seconds: float, deadline: float
) -> tuple[list[Outcome], int]:
    headers = {"X-Request-Timeout": str(deadline)}
    async with traffic.clients(url, 3 * deadline) as clients:
        questions = itertools.cycle(asked)
        return await traffic.open_loop(
            lambda planned, start: traffic.ask(
                next(clients), next(questions), planned=planned, start=start, headers=headers
            ),
            rate,
            seconds,
        )


def _cpu(before: float, after: float, outcomes: Sequence[Outcome]) -> str:
    return f"{1000 * (after - before) / max(1, sum(outcome.status == 200 for outcome in outcomes)):.1f} ms"


def _tokens_per_request(path: Path, asked: Sequence[Question]) -> float:
    encoder = setup.reference(path).encoder
    total = 0
    for question in asked:
        (prompt,) = question.body["prompts"]
        total += sum(len(encoder.encode(prompt["prompt"], candidate).ids) for candidate in prompt["candidates"])
    return total / len(asked)
