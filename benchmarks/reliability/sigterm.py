"""SIGTERM under load, repeated: accepted requests are answered, and no connection is reset."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.reliability import traffic
from benchmarks.reliability.checks import Outcome
from benchmarks.reliability.light_client import LightClient
from benchmarks.reliability.report import Check, Report
from benchmarks.reliability.server import COMPUTED, WORK, WatchedServer, model_paths, reference
from benchmarks.reliability.traffic import CheckedRequest

_LOAD = 0.8
_SECONDS = 3.0  # of load; the signal is sent in the middle


def sigterm(times: int) -> Report:
    """Sends SIGTERM to the server under load.

    Half of the requests use kept connections, half use new ones. Connections after the process has exited are refused;
    a load balancer has seen by then that the server is not ready.

    Args:
        times: Number of repetitions.
    """
    path, _ = model_paths()
    # Short requests allow a high rate, so that connections arrive at many moments of the shutdown.
    requests = traffic.checked_requests([reference(path)], 64, candidates=2, characters=60)
    arguments = ["--model", str(path), *COMPUTED]
    with WatchedServer(arguments, WORK / "capacity.log") as server:
        rate = _LOAD * asyncio.run(traffic.capacity(server.url, requests, 5))
    outcomes: list[Outcome] = []
    codes: Counter[int] = Counter()
    for number in range(times):
        with WatchedServer(arguments, WORK / f"sigterm-{number}.log") as server:
            outcomes += asyncio.run(_stop_under_load(server, requests, rate, number))
            codes[server.process.wait(60)] += 1
    faults = Counter(outcome.fault for outcome in outcomes if outcome.fault)
    statuses = Counter(outcome.status for outcome in outcomes if outcome.status)
    lost = faults["timeout"] + statuses[500] + statuses[504]
    resets = Counter(
        f"{outcome.kind}, {outcome.at - _SECONDS / 2:+.1f} s from the signal"
        for outcome in outcomes
        if outcome.fault.startswith("reset")
    )
    wrong = sum(count for fault, count in faults.items() if fault.startswith("wrong"))
    seen = f"replies {dict(statuses)}, refused connections {faults['refused']:,}"
    return Report(
        "SIGTERM under load",
        f"python -m benchmarks.reliability sigterm --times {times}",
        {"load": f"{times} times, {rate:.1f} requests/s for {_SECONDS:g} s, the signal after half of it; {seen}"},
        [
            Check("no accepted request is lost", f"{lost:,} of {len(outcomes):,}", not lost and not wrong),
            Check("no connection is reset", f"{resets.total():,} {dict(resets) or ''}".strip(), not resets),
            Check("it exits with 0", f"exit codes {dict(codes)}", set(codes) == {0}),
        ],
    )


async def _stop_under_load(
    server: WatchedServer, requests: Sequence[CheckedRequest], rate: float, seed: int
) -> list[Outcome]:
    numbers = itertools.count()

    async def send(planned: float, start: float) -> Outcome:
        number = next(numbers)
        request = requests[number % len(requests)]
        if number % 2:
            return replace(await traffic.send(kept, request, planned=planned, start=start), kind="kept connection")
        async with LightClient(server.url, 60) as new:
            return replace(await traffic.send(new, request, planned=planned, start=start), kind="new connection")

    async def stop() -> None:
        await asyncio.sleep(_SECONDS / 2)
        server.process.send_signal(signal.SIGTERM)

    async with LightClient(server.url, 60) as kept:
        (outcomes, _), _ = await asyncio.gather(traffic.open_loop(send, rate, _SECONDS, seed), stop())
    return outcomes
