"""SIGTERM under load, again and again: what was accepted is answered, and no connection is reset."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.harness.server import WatchedServer
from benchmarks.reliability import setup, traffic
from benchmarks.reliability.checks import Check, Outcome, Report
from benchmarks.reliability.light_client import Wire
from benchmarks.reliability.traffic import Question

_LOAD = 0.8
_SECONDS = 3.0  # of load; the signal comes in the middle


def sigterm(times: int) -> Report:
    """Ends the server under load.

    Half of the requests come on connections that are kept, half on new ones. Refused connections are those that come
    after it has left: a load balancer has by then seen that it is not ready.
    """
    path, _ = setup.model_paths()
    # Short requests, and so many of them: what is at stake is the moment at which a connection arrives.
    asked = traffic.questions([setup.reference(path)], 64, candidates=2, characters=60)
    arguments = ["--model", str(path), *setup.COMPUTED]
    with WatchedServer(arguments, setup.WORK / "capacity.log") as server:
        rate = _LOAD * asyncio.run(traffic.capacity(server.url, asked, 5))
    outcomes: list[Outcome] = []
    codes: Counter[int] = Counter()
    for number in range(times):
        with WatchedServer(arguments, setup.WORK / f"sigterm-{number}.log") as server:
            outcomes += asyncio.run(_leave(server, asked, rate, number))
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
    seen = f"answers {dict(statuses)}, refused connections {faults['refused']:,}"
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


async def _leave(server: WatchedServer, asked: Sequence[Question], rate: float, seed: int) -> list[Outcome]:
    turns = iter(range(10**9))

    async def send(planned: float, start: float) -> Outcome:
        turn = next(turns)
        question = asked[turn % len(asked)]
        if turn % 2:
            return replace(await traffic.ask(kept, question, planned=planned, start=start), kind="kept connection")
        async with Wire(server.url, 60) as fresh:
            return replace(await traffic.ask(fresh, question, planned=planned, start=start), kind="new connection")

    async def leave() -> None:
        await asyncio.sleep(_SECONDS / 2)
        server.process.send_signal(signal.SIGTERM)

    async with Wire(server.url, 60) as kept:
        (outcomes, _), _ = await asyncio.gather(traffic.open_loop(send, rate, _SECONDS, seed), leave())
    return outcomes
