"""The comparison: all contenders of a model stay loaded and are interleaved on the same samples, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import pstdev

from benchmarks.harness.rates import largest_difference
from benchmarks.harness.texts import Sample
from benchmarks.harness.worker_process import Timed, WorkerError, WorkerProcess
from benchmarks.harness.workloads import Samples, Workload
from benchmarks.throughput.contenders import OURS, REFERENCE, Contender, variables
from benchmarks.throughput.results import Measurement, Results

_WARM_UP = 0  # the number of a sample that no round uses


class Clock:
    """Counts down.

    Args:
        seconds: The time from now.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left; negative after the end."""
        return self._end - time.monotonic()


@dataclass(frozen=True, slots=True)
class Setting:
    """The settings with which contenders are started.

    Attributes:
        contenders: The contenders that may take part.
        interpreters: Interpreter by environment; a contender whose environment is missing does not take part.
        threads: Threads for each contender.
        report_progress: Receives one line of progress at a time.
        warm_up: The most responses of the warm-up of each workload; None for a whole sample, which a GPU needs.
    """

    contenders: Sequence[Contender]
    interpreters: Mapping[str, Path]
    threads: int
    report_progress: Callable[[str], None]
    warm_up: int | None = 2

    def start(self, contender: Contender) -> WorkerProcess:
        """Starts a contender's process."""
        python = self.interpreters[contender.environment]
        return WorkerProcess(contender.kind, python, variables(contender, python, self.threads))


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of all contenders on one model.

    Attributes:
        model: Name of the model.
        folder: Its folder.
        samples: Makes its samples.
        setting: The settings with which contenders are started.
        results: Receives the measurements.
        running: The processes of the contenders that take part.
    """

    model: str
    folder: Path
    samples: Samples
    setting: Setting
    results: Results
    running: dict[Contender, WorkerProcess] = field(default_factory=dict)

    def run(self, workloads: Sequence[Workload], rounds: int, clock: Clock) -> None:
        """Measures until all rounds are done or the time is over; rounds that were measured before are skipped."""
        possible = [
            contender
            for contender in self.setting.contenders
            if contender.environment in self.setting.interpreters
            and contender.takes(self.samples.architecture)
            and any(contender.scores(workload) for workload in workloads)
        ]
        if all(self._finished(workload, number, possible) for workload in workloads for number in range(rounds)):
            self._report("measured before")
            return
        with ExitStack() as processes:
            self._load(possible, processes)
            for workload in workloads:
                self._warm_up(workload)
            durations: dict[str, float] = {}
            for number in range(rounds):
                for workload in workloads:
                    if self._finished(workload, number, self.running):
                        continue
                    if clock.left < durations.get(workload.name, 0.0):
                        self._report(f"out of time before {workload.name}, round {number}")
                        return
                    started = time.monotonic()
                    self.results.add(self._round(workload, number))
                    durations[workload.name] = time.monotonic() - started

    def _finished(self, workload: Workload, number: int, contenders: Iterable[Contender]) -> bool:
        names = [contender.name for contender in contenders if contender.scores(workload)]
        return self.results.finished(self.model, workload.name, number, names)

    def _load(self, contenders: Sequence[Contender], processes: ExitStack) -> None:
        """Loads the contenders one after another: marginrm times its choices while it loads."""
        started = {contender: processes.enter_context(self.setting.start(contender)) for contender in contenders}
        for process in started.values():
            process.wait_for_imports()
        for contender, process in started.items():
            since = time.monotonic()
            try:
                detail = process.load(self.folder, contender.options)
            except WorkerError as error:
                self._exclude(contender, process, error)
                continue
            self.running[contender] = process
            self.results.add_detail(self.model, contender.name, detail)
            self._report(f"{contender.name} loaded in {time.monotonic() - since:.0f} s, {detail}")

    def _warm_up(self, workload: Workload) -> None:
        """Runs a workload once on every contender, and excludes contenders that fail."""
        whole = self.samples.sample(workload, _WARM_UP).subset(self.setting.warm_up)
        for contender in [contender for contender in self.running if contender.scores(workload)]:
            try:
                self.running[contender].run(whole.subset(contender.limit))
            except WorkerError as error:
                self._exclude(contender, self.running.pop(contender), error)

    def _exclude(self, contender: Contender, process: WorkerProcess, error: WorkerError) -> None:
        process.close()
        self._report(f"{contender.name} cannot take part: {error}")
        self.results.add_detail(self.model, contender.name, {"error": str(error)[-300:]})

    def _round(self, workload: Workload, number: int) -> list[Measurement]:
        whole = self.samples.sample(workload, _WARM_UP + 1 + number)
        measured: list[tuple[Contender, Sample, Timed]] = []
        rates: dict[str, float | None] = dict.fromkeys(("gemm_rate", "host_share"))
        order = [contender for contender in self.running if contender.scores(workload)]
        shift = number % len(order)  # no contender always follows the same other one
        for contender in order[shift:] + order[:shift]:
            sample = whole.subset(contender.limit)
            timed = self.running[contender].run(sample)
            if contender.name == OURS:
                rates = {name: self.running[contender].call(name) for name in rates}
            measured.append((contender, sample, timed))
            self._report(
                f"{workload.name} round {number}: {contender.name:28} {len(timed.values):3} rewards in "
                f"{timed.seconds:7.2f} s; other processes used {timed.others:.0%} of the cores"
            )
        reference = {
            ids: reward
            for contender, sample, timed in measured
            if contender.name == REFERENCE
            for ids, reward in zip(sample.ids, timed.values, strict=True)
        }
        return [
            Measurement(
                model=self.model,
                workload=workload.name,
                contender=contender.name,
                round=number,
                seconds=timed.seconds,
                rewards=len(timed.values),
                tokens=sample.tokens,
                sample_rewards=whole.responses,
                sample_tokens=whole.tokens,
                computed=timed.computed,
                peak_memory=timed.gpu_peak or timed.peak_rss,
                loaded_memory=timed.gpu_before or self.running[contender].loaded_rss,
                others=timed.others,
                **(rates if contender.name == OURS else {}),
                difference=largest_difference(dict(zip(sample.ids, timed.values, strict=True)), reference),
                deviation=pstdev(timed.values),
            )
            for contender, sample, timed in measured
        ]

    def _report(self, line: str) -> None:
        self.setting.report_progress(f"{self.model}: {line}")
