"""The comparison: all contenders of a model loaded at once, taking turns on the same portions, round after round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import pstdev

from benchmarks.harness.groups import Group, sample
from benchmarks.harness.rates import largest_difference
from benchmarks.harness.worker_process import ContenderError, ContenderProcess, Scored
from benchmarks.harness.workloads import Portions, Workload
from benchmarks.throughput.contenders import OURS, REFERENCE, Entrant, variables
from benchmarks.throughput.results import Measurement, Results

_WARM_UP = 0  # the portion that no round takes


class Clock:
    """Counts down.

    Args:
        seconds: How long it runs from now.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left; negative when it is over."""
        return self._end - time.monotonic()


@dataclass(frozen=True, slots=True)
class Setting:
    """How contenders are started.

    Attributes:
        entrants: Who may take part.
        pythons: Interpreter by environment; an entrant without one stays out.
        threads: Threads for each.
        say: Where progress goes.
    """

    entrants: Sequence[Entrant]
    pythons: Mapping[str, Path]
    threads: int
    say: Callable[[str], None]

    def start(self, entrant: Entrant) -> ContenderProcess:
        """Starts a contender's process."""
        python = self.pythons[entrant.environment]
        return ContenderProcess(entrant.kind, python, variables(entrant, python, self.threads))


def compare(
    model: str,
    folder: Path,
    portions: Portions,
    workloads: Sequence[Workload],
    rounds: int,
    setting: Setting,
    results: Results,
    clock: Clock,
) -> None:
    """Measures one model until all rounds are done or the clock runs out; portions measured before are skipped."""
    wanted = [
        entrant
        for entrant in setting.entrants
        if entrant.environment in setting.pythons and entrant.takes(portions.architecture)
    ]
    if all(
        results.finished(model, workload.name, number, _names(wanted, workload))
        for workload in workloads
        for number in range(rounds)
    ):
        setting.say(f"{model}: done before")
        return
    with ExitStack() as stack:
        running = _loaded(model, folder, wanted, setting, results, stack)
        for workload in workloads:
            _warm_up(model, workload, portions, running, setting, results)
        took: dict[str, float] = {}
        for number in range(rounds):
            for workload in workloads:
                present = {e: process for e, process in running.items() if e.scores(workload)}
                if not present or results.finished(model, workload.name, number, (e.name for e in present)):
                    continue
                if clock.left < took.get(workload.name, 0.0):
                    setting.say(f"{model}: out of time before {workload.name}, round {number}")
                    return
                started = time.monotonic()
                results.add(_portion(model, workload, number, portions, present, setting))
                took[workload.name] = time.monotonic() - started


def _names(entrants: Sequence[Entrant], workload: Workload) -> list[str]:
    return [entrant.name for entrant in entrants if entrant.scores(workload)]


def _loaded(
    model: str, folder: Path, entrants: Sequence[Entrant], setting: Setting, results: Results, stack: ExitStack
) -> dict[Entrant, ContenderProcess]:
    running = {}
    for entrant in entrants:
        started = time.monotonic()
        process = stack.enter_context(setting.start(entrant))
        try:
            detail = process.load(folder, entrant.options)
        except ContenderError as error:
            _stays_out(model, entrant, error, setting, results)
            continue
        running[entrant] = process
        results.add_detail(model, entrant.name, detail)
        setting.say(f"{model}: {entrant.name} loaded in {time.monotonic() - started:.0f} s, {detail}")
    return running


def _warm_up(
    model: str,
    workload: Workload,
    portions: Portions,
    running: dict[Entrant, ContenderProcess],
    setting: Setting,
    results: Results,
) -> None:
    """Lets every contender meet a workload once, with two responses; who fails stays out."""
    groups = sample(portions.portion(workload, _WARM_UP), 2)
    for entrant in [entrant for entrant in running if entrant.scores(workload)]:
        try:
            running[entrant].score(groups)
        except ContenderError as error:
            _stays_out(model, entrant, error, setting, results)
            running.pop(entrant).close()


def _stays_out(model: str, entrant: Entrant, error: ContenderError, setting: Setting, results: Results) -> None:
    setting.say(f"{model}: {entrant.name} cannot take part: {error}")
    results.add_detail(model, entrant.name, {"error": str(error)[-300:]})


def _portion(
    model: str,
    workload: Workload,
    number: int,
    portions: Portions,
    present: dict[Entrant, ContenderProcess],
    setting: Setting,
) -> list[Measurement]:
    groups = portions.portion(workload, _WARM_UP + 1 + number)
    measured: list[tuple[Entrant, list[Group], Scored, float | None]] = []
    order = list(present)
    turn = number % len(order)  # so that nobody always follows the same contender
    for entrant in order[turn:] + order[:turn]:
        given = sample(groups, entrant.limit)
        scored = present[entrant].score(given)
        rate = present[entrant].call("gemm_rate") if entrant.name == OURS else None
        measured.append((entrant, given, scored, rate))
        setting.say(
            f"{model} {workload.name} round {number}: {entrant.name:28} {len(scored.rewards):3} rewards in "
            f"{scored.seconds:7.2f} s; other processes used {scored.others:.0%} of the cores"
        )
    rewards = {entrant.name: _by_ids(given, scored) for entrant, given, scored, _ in measured}
    return [
        Measurement(
            model=model,
            workload=workload.name,
            contender=entrant.name,
            round=number,
            seconds=scored.seconds,
            rewards=len(scored.rewards),
            tokens=sum(group.tokens for group in given),
            portion_rewards=sum(len(group.responses) for group in groups),
            portion_tokens=sum(group.tokens for group in groups),
            computed=scored.computed,
            peak_rss=scored.peak_rss,
            loaded_rss=present[entrant].loaded_rss,
            others=scored.others,
            gemm_rate=rate,
            difference=largest_difference(rewards[entrant.name], rewards.get(REFERENCE, {})),
            deviation=pstdev(scored.rewards),
        )
        for entrant, given, scored, rate in measured
    ]


def _by_ids(groups: Sequence[Group], scored: Scored) -> dict[tuple[int, ...], float]:
    sequences = [ids for group in groups for ids in group.ids]
    return dict(zip(sequences, scored.rewards, strict=True))
