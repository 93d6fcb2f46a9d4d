"""Studies beside the comparison: the cost of N, of HTTP and of batch composition, and the memory of large requests.

Batch composition is what else is scored in the same forward pass. It changes the last bits of a reward, or with
`--deterministic` costs time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, pstdev
from typing import Any

from benchmarks.harness.rates import ratios
from benchmarks.harness.texts import Sample, shared_prefix
from benchmarks.harness.worker_process import ROOT, WorkerProcess
from benchmarks.harness.workloads import CLIENTS, LONG_PROMPT, LONG_RESPONSE, Samples, Workload
from benchmarks.throughput.compare import Clock, Setting
from benchmarks.throughput.contenders import Contender

_MIB = 2**20
_MANY = 64
_CONSECUTIVE = 8  # lone requests to one contender before the other's


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under study.

    Attributes:
        folder: Its folder.
        samples: Makes its samples.
        setting: The settings with which contenders are started.
        rounds: Number of measurements.
        clock: The time limit; a study that reaches it returns what it has measured.
    """

    folder: Path
    samples: Samples
    setting: Setting
    rounds: int
    clock: Clock


Study = Callable[[Subject], dict[str, Any]]


def cost_of_n(subject: Subject) -> dict[str, Any]:
    """Scores N = 64 candidates for an 800-token prompt, and N = 1, interleaved.

    Returns:
        `tokens`: tokens computed for 64, over 64 responses and one prompt. `seconds`: seconds per token of that ideal,
        over seconds per token with N = 1.
    """
    with subject.setting.start(_in_process()) as process:
        process.load(subject.folder, {})
        per_token: dict[int, dict[int, float]] = {1: {}, _MANY: {}}
        computed = []
        for number in range(subject.rounds + 1):
            if number > 1 and subject.clock.left < 0:
                break
            for candidates in (1, _MANY):
                group = subject.samples.long_group(LONG_PROMPT, LONG_RESPONSE, candidates, number)
                timed = process.run(Sample((group,)))
                ideal = group.tokens - (candidates - 1) * shared_prefix(group.ids)
                if number:  # round 0 is the warm-up
                    per_token[candidates][number] = timed.seconds / ideal
                if candidates == _MANY and timed.computed is not None:
                    computed.append(timed.computed / ideal)
    return {
        "tokens": median(computed),
        "seconds": median(ratios(per_token[_MANY], per_token[1])),
        "rounds": len(per_token[_MANY]),
    }


def http(subject: Subject) -> dict[str, Any]:
    """Sends pairs over HTTP and scores the same pairs in process, interleaved: one alone, then many from 16 clients.

    Returns:
        `added_ms`: the median of the time that HTTP adds to a lone pair. `throughput`: rewards per second with 16
        clients over those in process.
    """
    served = Contender("over HTTP", "throughput.scorers.over_http")
    with subject.setting.start(_in_process()) as process, subject.setting.start(served) as server:
        process.load(subject.folder, {})
        server.load(subject.folder, {})
        return _added_latency(subject, process, server) | _served_throughput(subject, process, server)


def _added_latency(subject: Subject, process: WorkerProcess, server: WorkerProcess) -> dict[str, Any]:
    lone = Workload("lone", 2, 1, clients=1)
    added, in_process = [], []
    for number in range(3 * subject.rounds + 1):
        first = number * (1 + _CONSECUTIVE)
        pairs = [subject.samples.sample(lone, first + place) for place in range(1 + _CONSECUTIVE)]
        here, there = (_consecutive(worker, pairs) for worker in (process, server))
        if number:  # round 0 is the warm-up
            added += [(after - before) * 1e3 for before, after in zip(here, there, strict=True)]
            in_process += [seconds * 1e3 for seconds in here]
        if added and subject.clock.left < 0:
            break
    return {"added_ms": median(added), "in_process_ms": median(in_process), "lone_requests": len(added)}


def _served_throughput(subject: Subject, process: WorkerProcess, server: WorkerProcess) -> dict[str, Any]:
    many = Workload("many", 2, 4 * CLIENTS)
    throughput = []
    for number in range(subject.rounds + 1):
        sample = subject.samples.sample(many, number)
        order = (process, server) if number % 2 else (server, process)
        seconds = {worker: worker.run(sample).seconds for worker in order}
        if number:
            throughput.append(seconds[process] / seconds[server])
        if throughput and subject.clock.left < 0:
            break
    return {
        "throughput": median(throughput),
        "throughput_low": min(throughput),
        "throughput_high": max(throughput),
        "rounds": len(throughput),
    }


def _consecutive(worker: WorkerProcess, samples: Sequence[Sample]) -> list[float]:
    """Returns the seconds of each run but the first, during which the other process's threads still spin."""
    return [worker.run(sample).seconds for sample in samples][1:]


def memory(subject: Subject) -> dict[str, Any]:
    """Scores requests of growing size with several token budgets, each in a fresh process.

    Returns:
        For each budget and N the MiB that scoring took in addition to the loaded model and the request's own texts, and
        `growth`: those of N = 256 over those of N = 64, with the server's default budget.
    """
    with subject.setting.start(_in_process()) as process:
        default = process.load(subject.folder, {})["token_budget"]
    found: dict[str, Any] = {}
    for budget in dict.fromkeys((default, 1024, 2048, 8192)):
        for candidates in (16, 64, 256):
            with subject.setting.start(_in_process()) as process:
                process.load(subject.folder, {"token_budget": budget})
                group = subject.samples.long_group(LONG_PROMPT, LONG_RESPONSE, candidates, candidates)
                timed = process.run(Sample((group,)))
            found[_memory_key(budget, candidates)] = round((timed.peak_rss - timed.rss_before) / _MIB)
        if subject.clock.left < 0:
            break
    return {"growth": found[_memory_key(default, 256)] / found[_memory_key(default, 64)], **found}


def _memory_key(budget: int, candidates: int) -> str:
    return f"budget {budget}, N = {candidates}: MiB"


def composition(subject: Subject) -> dict[str, Any]:
    """Scores responses alone and together, in each dtype and in deterministic mode.

    Returns:
        The largest difference between the two rewards of a response, by dtype; `deterministic`: the same in deterministic
        mode; `deviation`: the standard deviation of the rewards.
    """
    together = subject.samples.sample(Workload("composition", 4, 4), 0)
    alone = [Sample((group.only([index]),)) for group in together.groups for index in range(len(group.responses))]
    found: dict[str, Any] = {}
    for dtype, deterministic in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
        with subject.setting.start(_in_process()) as process:
            process.load(subject.folder, {"dtype": dtype, "deterministic": deterministic})
            rewards = process.run(together).values
            differences = [abs(process.run(one).values[0] - reward) for one, reward in zip(alone, rewards, strict=True)]
        found["deterministic" if deterministic else dtype] = max(differences)
        found["deviation"] = pstdev(rewards)
        if subject.clock.left < 0:
            break
    return found


def host(subject: Subject) -> dict[str, Any]:
    """Runs `benchmarks.host` in a process of its own.

    Returns:
        Computed tokens per second of library and server, and microseconds of planning a token, on pairs; the same of
        `bon-long` with its name before.
    """
    output = subject.folder.parent.parent
    command = [sys.executable, "-m", "benchmarks.host", "--rounds", str(subject.rounds), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    rates = {name: {key: value for key, value in one.items() if key != "stage_us"} for name, one in found.items()}
    return rates["pairs"] | {f"bon-long, {key}": value for key, value in rates["bon-long"].items()}


STUDIES: dict[str, Study] = {
    "host": host,
    "cost of N": cost_of_n,
    "http": http,
    "memory": memory,
    "composition": composition,
}
WITHOUT_DECODER = frozenset({"host", "http"})  # studies that any model may take, a short encoder too


def _in_process() -> Contender:
    return Contender("in process", "throughput.scorers.in_process")
