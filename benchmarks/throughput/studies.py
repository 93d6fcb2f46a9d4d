"""Four questions beside the comparison: what N, HTTP and company cost, and what a large request costs in memory.

Company is what is scored beside a text: it costs bits of its reward, or with `--deterministic` time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, pstdev
from typing import Any

from benchmarks.harness.groups import Group
from benchmarks.harness.rates import ratios
from benchmarks.harness.worker_process import ContenderProcess
from benchmarks.harness.workloads import LONG_PROMPT, LONG_RESPONSE, Portions, Workload
from benchmarks.throughput.compare import Clock, Setting
from benchmarks.throughput.contenders import CLIENTS, Entrant

_MIB = 2**20
_MANY = 64
_IN_A_ROW = 8  # lone requests that are counted, before it is the other's turn


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under study.

    Attributes:
        folder: Where it lies.
        portions: Its texts.
        setting: How contenders are started.
        rounds: How often each thing is measured.
        clock: When to stop; what has been measured until then is the finding.
    """

    folder: Path
    portions: Portions
    setting: Setting
    rounds: int
    clock: Clock


Study = Callable[[Subject], dict[str, Any]]


def cost_of_n(subject: Subject) -> dict[str, Any]:
    """Scores N = 64 candidates to an 800-token prompt, and N = 1, in turn.

    Returns:
        `tokens`: tokens computed for 64, over 64 responses and one prompt. `seconds`: seconds per token of that ideal,
        over seconds per token with N = 1.
    """
    with subject.setting.start(_ours()) as ours:
        ours.load(subject.folder, {})
        per_token: dict[int, dict[int, float]] = {1: {}, _MANY: {}}
        computed = []
        for number in range(subject.rounds + 1):
            if number > 1 and subject.clock.left < 0:
                break
            for candidates in (1, _MANY):
                group = subject.portions.long_group(LONG_PROMPT, LONG_RESPONSE, candidates, number)
                scored = ours.score([group])
                ideal = group.tokens - (candidates - 1) * shared_prefix(group.ids)
                if number:  # the first time warms up
                    per_token[candidates][number] = scored.seconds / ideal
                if candidates == _MANY and scored.computed is not None:
                    computed.append(scored.computed / ideal)
    return {
        "tokens": median(computed),
        "seconds": median(ratios(per_token[_MANY], per_token[1])),
        "rounds": len(per_token[_MANY]),
    }


def shared_prefix(sequences: tuple[tuple[int, ...], ...]) -> int:
    """Returns how many leading tokens all sequences have in common."""
    first, last = min(sequences), max(sequences)
    return next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def http(subject: Subject) -> dict[str, Any]:
    """Sends pairs over HTTP and scores the same pairs in process, in turn: one alone, then many from 16 clients.

    Returns:
        `added_ms`: the median of what HTTP adds to a lone pair. `throughput`: rewards per second with 16 clients over
        those in process.
    """
    lone, crowd = Workload("lone", 2, 1), Workload("crowd", 2, 4 * CLIENTS)
    served = Entrant("over HTTP", "throughput.scorers.over_http", {"clients": CLIENTS})
    with subject.setting.start(_ours()) as ours, subject.setting.start(served) as server:
        ours.load(subject.folder, {})
        server.load(subject.folder, served.options)
        added, throughput = [], []
        alone_ms = []
        for number in range(3 * subject.rounds + 1):
            pairs = [subject.portions.portion(lone, number * (1 + _IN_A_ROW) + place) for place in range(1 + _IN_A_ROW)]
            here, there = (_in_a_row(process, pairs) for process in (ours, server))
            if number:  # the first time warms up
                added += [(after - before) * 1e3 for before, after in zip(here, there, strict=True)]
                alone_ms += [seconds * 1e3 for seconds in here]
            if added and subject.clock.left < 0:
                break
        for number in range(subject.rounds + 1):
            groups = subject.portions.portion(crowd, number)
            order = (ours, server) if number % 2 else (server, ours)
            seconds = {process: process.score(groups).seconds for process in order}
            if number:
                throughput.append(seconds[ours] / seconds[server])
            if throughput and subject.clock.left < 0:
                break
    return {
        "added_ms": median(added),
        "in_process_ms": median(alone_ms),
        "lone_requests": len(added),
        "throughput": median(throughput),
        "throughput_low": min(throughput),
        "throughput_high": max(throughput),
        "rounds": len(throughput),
    }


def _in_a_row(process: ContenderProcess, pairs: Sequence[Sequence[Group]]) -> list[float]:
    """Returns the seconds of each call but the first, which still meets the spinning threads of another process."""
    return [process.score(groups).seconds for groups in pairs][1:]


def memory(subject: Subject) -> dict[str, Any]:
    """Scores ever larger requests with several token budgets, each in a fresh process.

    Returns:
        For each budget and N the MiB that scoring took over those of the loaded model and the request's own texts, and
        `growth`: those of N = 256 over those of N = 64, with the budget that the server takes by default.
    """
    with subject.setting.start(_ours()) as ours:
        default = ours.load(subject.folder, {})["token_budget"]
    found: dict[str, Any] = {}
    for budget in dict.fromkeys((default, 1024, 2048, 8192)):
        for candidates in (16, 64, 256):
            with subject.setting.start(_ours()) as ours:
                ours.load(subject.folder, {"token_budget": budget})
                group = subject.portions.long_group(LONG_PROMPT, LONG_RESPONSE, candidates, candidates)
                scored = ours.score([group])
            found[_memory_key(budget, candidates)] = round((scored.peak_rss - scored.rss_before) / _MIB)
        if subject.clock.left < 0:
            break
    return {"growth": found[_memory_key(default, 256)] / found[_memory_key(default, 64)], **found}


def _memory_key(budget: int, candidates: int) -> str:
    return f"budget {budget}, N = {candidates}: MiB"


def company(subject: Subject) -> dict[str, Any]:
    """Scores responses alone and together, in each dtype and deterministic.

    Returns:
        For each the largest difference that company made to a reward, and `deviation`, that of the rewards themselves;
        and `deterministic`, the difference in the mode that promises none.
    """
    groups = subject.portions.portion(Workload("company", 4, 4), 0)
    alone = [[group.only([index])] for group in groups for index in range(len(group.responses))]
    found: dict[str, Any] = {}
    for dtype, deterministic in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
        with subject.setting.start(_ours()) as ours:
            ours.load(subject.folder, {"dtype": dtype, "deterministic": deterministic})
            together = ours.score(groups).rewards
            differences = [
                abs(ours.score(one).rewards[0] - reward) for one, reward in zip(alone, together, strict=True)
            ]
        found["deterministic" if deterministic else dtype] = max(differences)
        found["deviation"] = pstdev(together)
        if subject.clock.left < 0:
            break
    return found


STUDIES: dict[str, Study] = {"cost of N": cost_of_n, "http": http, "memory": memory, "company": company}


def _ours() -> Entrant:
    return Entrant("in process", "throughput.scorers.in_process")
