"""Open-loop load above what the server can do: it must answer what it accepts in time, and refuse the rest politely."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.harness.server import WatchedServer
from benchmarks.reliability import checks, setup, traffic
from benchmarks.reliability.checks import Check, Outcome, Report
from benchmarks.reliability.light_client import Wire
from benchmarks.reliability.traffic import Question

_CAPACITY_SECONDS = 20.0
_TURNS = 6
_TURN_SECONDS = 20.0


def overload(minutes: float, times: float, deadline: float) -> Report:
    """Runs the server at a multiple of its capacity, and then at one and the other in turns.

    A machine shared with others gets slower and faster within minutes, so goodput is compared turn by turn.

    Args:
        minutes: How long at the multiple, without a pause.
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
        many = _load(server, asked, rate * times, seconds, deadline)
        rss = list(server.rss)
        turns = asyncio.run(_turns(server.url, asked, rate, times, deadline))
    accepted = [outcome.seconds for outcome in many.outcomes if outcome.status == 200]
    p99 = checks.percentile(accepted, 0.99)
    facts = {
        "capacity": f"{rate:.1f} requests/s (closed loop of 16), each 8 candidates and about {tokens:.0f} tokens",
        "load": f"{times:g} times that, {many.sent:,} requests in {seconds:.0f} s (Poisson), all answered after "
        f"{many.took:.0f} s",
        "deadline": f"{deadline:g} s, as X-Request-Timeout; the queue has its default bounds",
        f"at {times:g}x": many.costs(),
        "then in turns": f"{len(turns)} times {_TURN_SECONDS:g} s at 1x and as long at {times:g}x, the queue full all the "
        "time; what was answered rightly in each, per second: "
        + ", ".join(f"{one:.1f} and {more:.1f}" for one, more in turns),
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
            _goodput(turns, times),
        ],
    )


def _goodput(turns: Sequence[tuple[float, float]], times: float) -> Check:
    ratios = [more / max(one, 1e-9) for one, more in turns]
    seen = f"{median(ratios):.0%} (median of {len(ratios)} turns; {min(ratios):.0%} to {max(ratios):.0%})"
    return Check(f"goodput at {times:g}x at least 90% of that at 1x", seen, median(ratios) >= 0.9)


async def _turns(
    url: str, asked: Sequence[Question], rate: float, times: float, deadline: float
) -> list[tuple[float, float]]:
    """Loads the server in turns: at capacity all the time, and above it until the queue is full and in every second turn.

    Returns:
        For each turn the right and timely answers that came, per second: at capacity, and at the multiple after it.
    """
    above, full = (times - 1) * rate, 1.5 * deadline
    middles = [full + (2 * turn + 1) * _TURN_SECONDS for turn in range(_TURNS)]
    crests = [(middle, above, _TURN_SECONDS) for middle in middles]
    loads = [(0.0, rate, full + 2 * _TURNS * _TURN_SECONDS), (0.0, above, full), *crests]
    outcomes, _ = await _send(url, asked, loads, deadline)
    return [
        (
            checks.goodput(outcomes, deadline, middle - _TURN_SECONDS, _TURN_SECONDS),
            checks.goodput(outcomes, deadline, middle, _TURN_SECONDS),
        )
        for middle in middles
    ]


@dataclass(frozen=True, slots=True)
class _Load:
    """What became of a load, and what it cost.

    Attributes:
        outcomes: Of its requests.
        sent: How many those were.
        took: Seconds until the last was answered.
        server: CPU seconds of the server.
        client: CPU seconds of this process.
        worked: Seconds of the steps of the server's worker.
    """

    outcomes: Sequence[Outcome]
    sent: int
    took: float
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
    outcomes, sent = asyncio.run(_send(server.url, asked, [(0.0, rate, seconds)], deadline))
    return _Load(
        outcomes,
        sent,
        took=time.perf_counter() - started,
        server=server.cpu_seconds - cpu,
        client=time.process_time() - own,
        worked=server.steps[0] - worked,
    )


async def _send(
    url: str, asked: Sequence[Question], loads: Sequence[tuple[float, float, float]], deadline: float
) -> tuple[list[Outcome], int]:
    """Sends loads, each given by when it starts (in seconds), its requests per second and its seconds.

    Returns:
        All outcomes, and how many requests were sent.
    """
    headers = f"X-Request-Timeout: {deadline:g}\r\n"
    questions = itertools.cycle(asked)
    async with Wire(url, 3 * deadline) as wire:
        origin = time.perf_counter()

        async def load(number: int, start: float, rate: float, seconds: float) -> tuple[list[Outcome], int]:
            await asyncio.sleep(start)
            return await traffic.open_loop(
                lambda planned, _: traffic.ask(wire, next(questions), planned=planned, start=origin, headers=headers),
                rate,
                seconds,
                seed=number,
            )

        done = await asyncio.gather(*(load(number, *one) for number, one in enumerate(loads)))
    return [outcome for outcomes, _ in done for outcome in outcomes], sum(sent for _, sent in done)


def _tokens_per_request(path: Path, asked: Sequence[Question]) -> float:
    encoder = setup.reference(path).encoder
    total = 0
    for question in asked:
        (prompt,) = question.body["prompts"]
        total += sum(len(encoder.encode(prompt["prompt"], candidate).ids) for candidate in prompt["candidates"])
    return total / len(asked)
