"""Open-loop load above what the server can do: it must answer what it accepts in time, and refuse the rest politely."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability import checks, setup, traffic
from benchmarks.reliability.checks import Check, Outcome, Report
from benchmarks.reliability.server import WatchedServer
from benchmarks.reliability.traffic import Question
from benchmarks.reliability.wire import Wire

_CAPACITY_SECONDS = 20.0


def overload(minutes: float, times: float, deadline: float) -> Report:
    """Runs the server at its capacity and at a multiple of it.

    Args:
        minutes: How long at the multiple; before and after a fifth as long, at least 30 s, at capacity.
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
        # A machine may get slower or faster within minutes, so that at capacity is measured before and after.
        before = _load(server, asked, rate, max(30.0, seconds / 5), deadline)
        server.rss.clear()
        many = _load(server, asked, rate * times, seconds, deadline)
        rss = list(server.rss)
        after = _load(server, asked, rate, max(30.0, seconds / 5), deadline)
    once = (before.goodput + after.goodput) / 2
    accepted = [outcome.seconds for outcome in many.outcomes if outcome.status == 200]
    p99 = checks.percentile(accepted, 0.99)
    facts = {
        "capacity": f"{rate:.1f} requests/s (closed loop of 16), each 8 candidates and about {tokens:.0f} tokens",
        "load": f"{times:g} times that, {many.sent:,} requests in {seconds:.0f} s (Poisson), all answered after "
        f"{many.took:.0f} s",
        "deadline": f"{deadline:g} s, as X-Request-Timeout; the queue has its default bounds",
        "at 1x, before": before.costs(),
        f"at {times:g}x": many.costs(),
        "at 1x, after": after.costs(),
    }
    return Report(
        f"Overload, {times:g} times capacity",
        f"python -m benchmarks.reliability overload --minutes {minutes:g} --times {times:g} --deadline {deadline:g}",
        facts,
        [
            checks.answered_once(many.outcomes, many.sent),
            checks.only_statuses(many.outcomes, {200, 429, 503}),
            checks.right_rewards(many.outcomes, len(accepted)),
            Check("p99 of the accepted under the deadline", f"{p99:.2f} s of {deadline:g} s", p99 < deadline),
            checks.flat_memory(rss, 0.05),
            Check(
                f"goodput at {times:g}x at least 90% of that at 1x",
                f"{many.goodput:.1f} against {before.goodput:.1f} before and {after.goodput:.1f} after: "
                f"{many.goodput / max(once, 1e-9):.1%}",
                many.goodput >= 0.9 * once,
            ),
        ],
    )


@dataclass(frozen=True, slots=True)
class _Load:
    """What became of a load, and what it cost.

    Attributes:
        outcomes: Of its requests.
        sent: How many those were.
        took: Seconds until the last was answered.
        goodput: Right answers within the deadline, per second of sending.
        server: CPU seconds of the server.
        client: CPU seconds of this process.
        worked: Seconds of the steps of the server's worker.
    """

    outcomes: Sequence[Outcome]
    sent: int
    took: float
    goodput: float
    server: float
    client: float
    worked: float

    def costs(self) -> str:
        """Returns who computed for how long, for people."""
        answers = max(1, sum(outcome.status == 200 for outcome in self.outcomes))
        return (
            f"the worker is in a step for {self.worked / self.took:.0%} of the time; CPU time for each answer: "
            f"{1000 * self.server / answers:.1f} ms of the server, {1000 * self.client / answers:.1f} ms of the client"
        )


def _load(server: WatchedServer, asked: Sequence[Question], rate: float, seconds: float, deadline: float) -> _Load:
    cpu, own, worked, started = server.cpu_seconds, time.process_time(), server.steps[0], time.perf_counter()
    outcomes, sent = asyncio.run(_send(server.url, asked, rate, seconds, deadline))
    return _Load(
        outcomes,
        sent,
        took=time.perf_counter() - started,
        goodput=checks.goodput(outcomes, deadline, seconds),
        server=server.cpu_seconds - cpu,
        client=time.process_time() - own,
        worked=server.steps[0] - worked,
    )


async def _send(
    url: str, asked: Sequence[Question], rate: float, seconds: float, deadline: float
) -> tuple[list[Outcome], int]:
    headers = f"X-Request-Timeout: {deadline:g}\r\n"
    questions = itertools.cycle(asked)
    async with Wire(url, 3 * deadline) as wire:
        return await traffic.open_loop(
            lambda planned, start: traffic.ask(wire, next(questions), planned=planned, start=start, headers=headers),
            rate,
            seconds,
        )


def _tokens_per_request(path: Path, asked: Sequence[Question]) -> float:
    encoder = setup.reference(path).encoder
    total = 0
    for question in asked:
        (prompt,) = question.body["prompts"]
        total += sum(len(encoder.encode(prompt["prompt"], candidate).ids) for candidate in prompt["candidates"])
    return total / len(asked)
