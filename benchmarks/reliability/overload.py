"""Open-loop load above the capacity: accepted requests are answered in time, the rest is refused with `Retry-After`."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.reliability import checks, traffic
from benchmarks.reliability.checks import Outcome
from benchmarks.reliability.light_client import LightClient
from benchmarks.reliability.report import Check, Report
from benchmarks.reliability.server import COMPUTED, WORK, WatchedServer, model_paths, reference
from benchmarks.reliability.traffic import CheckedRequest

_CAPACITY_SECONDS = 20.0
_CYCLES = 6
_PHASE_SECONDS = 20.0  # a cycle is one phase at capacity and one at the multiple


def overload(minutes: float, times: float, deadline: float) -> Report:
    """Runs the server at a multiple of its capacity, and then at its capacity and at the multiple in alternation.

    The speed of a shared machine changes within minutes, so goodput is compared cycle by cycle.

    Args:
        minutes: Minutes at the multiple without a pause.
        times: The multiple.
        deadline: Seconds from the planned start of a request; sent as `X-Request-Timeout`.
    """
    path, _ = model_paths()
    requests = traffic.checked_requests([reference(path)], 64)
    tokens = _tokens_per_request(path, requests)
    base = ["--model", str(path), *COMPUTED]
    seconds = minutes * 60
    with WatchedServer(base, WORK / "capacity.log") as server:
        rate = asyncio.run(traffic.capacity(server.url, requests, min(_CAPACITY_SECONDS, seconds)))
    with WatchedServer(base, WORK / "overload.log") as server:
        above = _measure(server, requests, rate * times, seconds, deadline)
        rss = list(server.rss)
        cycles = asyncio.run(_alternate(server.url, requests, rate, times, deadline))
    accepted = [outcome.seconds for outcome in above.outcomes if outcome.status == 200]
    p99 = checks.percentile(accepted, 0.99)
    facts = {
        "capacity": f"{rate:.1f} requests/s (closed loop of 16), each 8 candidates and about {tokens:.0f} tokens",
        "load": f"{times:g} times that, {above.sent:,} requests in {seconds:.0f} s (Poisson), the last reply after "
        f"{above.duration:.0f} s",
        "deadline": f"{deadline:g} s, as X-Request-Timeout; the queue has its default bounds",
        f"at {times:g}x": above.costs(),
        "alternation": f"{len(cycles)} cycles of {_PHASE_SECONDS:g} s at 1x and {_PHASE_SECONDS:g} s at {times:g}x, with "
        "a full queue all the time; correct replies within the deadline in each phase, per second: "
        + ", ".join(f"{one:.1f} and {more:.1f}" for one, more in cycles),
    }
    return Report(
        f"Overload, {times:g} times capacity",
        f"python -m benchmarks.reliability overload --minutes {minutes:g} --times {times:g} --deadline {deadline:g}",
        facts,
        [
            checks.answered_once(above.outcomes, above.sent),
            checks.only_statuses(above.outcomes, {200, 429, 503}),
            checks.right_rewards(above.outcomes, len(accepted)),
            Check("p99 of accepted requests below the deadline", f"{p99:.2f} s of {deadline:g} s", p99 < deadline),
            checks.flat_memory(rss, 0.05),
            _goodput(cycles, times),
        ],
    )


def _goodput(cycles: Sequence[tuple[float, float]], times: float) -> Check:
    ratios = [more / max(one, 1e-9) for one, more in cycles]
    seen = f"{median(ratios):.0%} (median of {len(ratios)} cycles; {min(ratios):.0%} to {max(ratios):.0%})"
    return Check(f"goodput at {times:g}x at least 90% of that at 1x", seen, median(ratios) >= 0.9)


async def _alternate(
    url: str, requests: Sequence[CheckedRequest], rate: float, times: float, deadline: float
) -> list[tuple[float, float]]:
    """Sends the capacity all the time, and the rest of the multiple until the queue is full and in every second phase.

    Returns:
        The goodput of each cycle: at capacity, and at the multiple after it.
    """
    extra, filling = (times - 1) * rate, 1.5 * deadline
    middles = [filling + (2 * cycle + 1) * _PHASE_SECONDS for cycle in range(_CYCLES)]
    loads = [
        _Load(0.0, rate, filling + 2 * _CYCLES * _PHASE_SECONDS),
        _Load(0.0, extra, filling),
        *(_Load(middle, extra, _PHASE_SECONDS) for middle in middles),
    ]
    outcomes, _ = await _send(url, requests, loads, deadline)
    return [
        (
            checks.goodput(outcomes, deadline, middle - _PHASE_SECONDS, _PHASE_SECONDS),
            checks.goodput(outcomes, deadline, middle, _PHASE_SECONDS),
        )
        for middle in middles
    ]


@dataclass(frozen=True, slots=True)
class _Load:
    """A constant load.

    Attributes:
        start: Seconds after the start of the run.
        rate: Requests per second.
        seconds: Duration.
    """

    start: float
    rate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _Measured:
    """The outcomes of a load and its cost.

    Attributes:
        outcomes: Outcomes of its requests.
        sent: Number of requests sent.
        duration: Seconds until the last reply.
        server: CPU seconds of the server.
        client: CPU seconds of this process.
        in_steps: Seconds of the steps of the server's worker.
    """

    outcomes: Sequence[Outcome]
    sent: int
    duration: float
    server: float
    client: float
    in_steps: float

    def costs(self) -> str:
        """Returns the worker's load and the CPU time of a reply, as text."""
        replies = max(1, sum(outcome.status == 200 for outcome in self.outcomes))
        return (
            f"the worker is in a step for {self.in_steps / self.duration:.0%} of the time; CPU time for each reply: "
            f"{1000 * self.server / replies:.1f} ms of the server, {1000 * self.client / replies:.1f} ms of the client"
        )


def _measure(
    server: WatchedServer, requests: Sequence[CheckedRequest], rate: float, seconds: float, deadline: float
) -> _Measured:
    cpu, own, in_steps, started = server.cpu_seconds, time.process_time(), server.steps[0], time.perf_counter()
    outcomes, sent = asyncio.run(_send(server.url, requests, [_Load(0.0, rate, seconds)], deadline))
    return _Measured(
        outcomes,
        sent,
        duration=time.perf_counter() - started,
        server=server.cpu_seconds - cpu,
        client=time.process_time() - own,
        in_steps=server.steps[0] - in_steps,
    )


async def _send(
    url: str, requests: Sequence[CheckedRequest], loads: Sequence[_Load], deadline: float
) -> tuple[list[Outcome], int]:
    """Sends loads side by side and returns all outcomes and the number of requests sent."""
    headers = f"X-Request-Timeout: {deadline:g}\r\n"
    endless = itertools.cycle(requests)
    async with LightClient(url, 3 * deadline) as client:
        origin = time.perf_counter()

        async def send(seed: int, load: _Load) -> tuple[list[Outcome], int]:
            await asyncio.sleep(load.start)
            return await traffic.open_loop(
                lambda planned, _: traffic.send(client, next(endless), planned=planned, start=origin, headers=headers),
                load.rate,
                load.seconds,
                seed,
            )

        done = await asyncio.gather(*(send(seed, load) for seed, load in enumerate(loads)))
    return [outcome for outcomes, _ in done for outcome in outcomes], sum(sent for _, sent in done)


def _tokens_per_request(path: Path, requests: Sequence[CheckedRequest]) -> float:
    encoder = reference(path).encoder
    total = 0
    for request in requests:
        (prompt,) = request.body["prompts"]
        total += sum(len(encoder.encode(prompt["prompt"], candidate).ids) for candidate in prompt["candidates"])
    return total / len(requests)
