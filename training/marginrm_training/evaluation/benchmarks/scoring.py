"""Rewards of a benchmark's cases -> its score, by its own published rule, with a bootstrap interval.

Every rule is a mean of means: a value for each case, a mean for each subset, a weighted mean of those for each section,
and a mean of the sections. So one bootstrap serves all: cases are drawn again within their subset.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from marginrm.calibration import Floats
from marginrm.errors import DataError
from marginrm_training.evaluation.benchmarks.formats import STYLES, Case
from marginrm_training.evaluation.benchmarks.sections import SECTIONS, Benchmark

Rewards = tuple[Sequence[float], Sequence[float]]  # the right responses' and the wrong ones'
Means = Mapping[str, Floats]  # subset -> mean value, [..., values of a case]
UNREADABLE = ((0.0,), (1.0,))  # rewards that are wrong under every rule

_JUDGE_BENCH = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}


@dataclass(frozen=True, slots=True)
class Score:
    """A benchmark's result.

    Attributes:
        metrics: Subsets, sections and `overall` by name, each in [0, 1], with `_low` and `_high` of its 95% interval.
        missing: Subsets that the data lacks; then there is no `overall`, since it would not be comparable.
    """

    metrics: dict[str, float]
    missing: list[str] = field(default_factory=list)


def score(
    benchmark: Benchmark, cases: Sequence[Case], rewards: Sequence[Rewards], *, resamples: int = 1000, seed: int = 0
) -> Score:
    """Scores a benchmark by its own rule.

    Args:
        benchmark: The benchmark.
        cases: Its cases.
        rewards: For each case, the rewards of its chosen and of its rejected responses.
        resamples: Bootstrap samples: cases drawn again within their subset.
        seed: Seed of the bootstrap.

    Raises:
        DataError: A subset is not of this benchmark, or half of a pair of ties is missing.
    """
    values = _values(benchmark, cases, rewards)
    sections = _sections(benchmark, values)
    missing = sorted(name for parts in sections.values() for name in parts if name not in values)
    found = _summary(benchmark, sections, {name: rows.mean(axis=0) for name, rows in values.items()}, not missing)
    generator = np.random.default_rng(seed)
    drawn = {name: _resampled(rows, resamples, generator) for name, rows in values.items()}
    samples = _summary(benchmark, sections, drawn, not missing)
    metrics: dict[str, float] = {}
    for name, value in found.items():
        low, high = np.quantile(samples[name], (0.025, 0.975))
        metrics |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    return Score(metrics, missing)


def _resampled(rows: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Returns the means of cases drawn again, [resamples, values of a case]."""
    weights: Floats = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), resamples) / len(rows)
    means: Floats = weights @ rows
    return means


def _values(benchmark: Benchmark, cases: Sequence[Case], rewards: Sequence[Rewards]) -> dict[str, Floats]:
    """Returns each subset's values, [cases, values of a case]; a pair of ties is one case."""
    found: dict[str, list[Sequence[float]]] = {}
    ties: dict[str, dict[str, Rewards]] = {}
    for case, (chosen, rejected) in zip(cases, rewards, strict=True):
        if benchmark == "rewardbench2" and case.subset.lower() == "ties":
            kind, _, number = case.key.partition(":")
            ties.setdefault(number, {})[kind] = (chosen, rejected)
        elif benchmark == "rewardbench2":
            found.setdefault(case.subset, []).append([best_of_k(chosen[0], rejected)])
        elif benchmark == "rm-bench":
            found.setdefault(case.subset, []).append([float(c > r) for c in _styles(chosen) for r in _styles(rejected)])
        else:  # strictly above every other one: RewardBench's and JudgeBench's pairs, RMB's pairs and Best-of-N
            found.setdefault(case.subset, []).append([float(chosen[0] > max(rejected))])
    if ties:
        halves = [f"{kind}:{number}" for number, both in ties.items() for kind in ("ref", "tied") if kind not in both]
        if halves:
            raise DataError(f"Ties come as ref:NUMBER and tied:NUMBER; missing here: {', '.join(halves[:8])}.")
        found["Ties"] = [[tie_score(both["ref"], both["tied"])] for both in ties.values()]
    return {name: np.array(rows, dtype=np.float64) for name, rows in found.items()}


def _styles(rewards: Sequence[float]) -> Sequence[float]:
    return rewards if len(rewards) == STYLES else [rewards[0]] * STYLES  # UNREADABLE has one


def best_of_k(chosen: float, rejected: Sequence[float]) -> float:
    """RewardBench 2's rule outside Ties: 1 if the right response alone has the highest reward, 1/k if k share it."""
    best = max(chosen, *rejected)
    return 1 / (1 + list(rejected).count(best)) if chosen == best else 0.0


def tie_score(reference: Rewards, tied: Rewards) -> float:
    """RewardBench 2's rule for a prompt of Ties; the subset's score is the mean over its prompts.

    With the gap = lowest right reward - highest wrong reward, and the spread = highest - lowest right reward of the
    version with many right answers: 0.3 each for a gap over 0 in both versions, 0.2 each for the gap, and for the
    smaller of both gaps, over the spread, and 0.01 tanh(smaller gap / spread - 1), which breaks ties.
    """
    ref_gap, gap = (min(right) - max(wrong) for right, wrong in (reference, tied))
    spread = max(tied[0]) - min(tied[0])
    least = min(ref_gap, gap)
    # At a spread of 0 as numpy has it: infinity with the gap's sign, and 0/0 counts as 0.
    at_zero = math.copysign(1.0, least) if least else 0.0
    margin = math.tanh(least / spread - 1) if spread > 0 else at_zero
    return 0.3 * (gap > 0) + 0.3 * (ref_gap > 0) + 0.2 * (gap > spread) + 0.2 * (least > spread) + 0.01 * margin


def _sections(benchmark: Benchmark, values: Mapping[str, Floats]) -> Mapping[str, Mapping[str, int]]:
    if benchmark == "judgebench":  # the mean over all pairs: each source counts by its pairs
        grouped: dict[str, dict[str, int]] = {name: {} for name in _JUDGE_BENCH.values()}
        for name, rows in values.items():
            kind = next((kind for prefix, kind in _JUDGE_BENCH.items() if name.startswith(prefix)), None)
            if kind is None:
                raise DataError(f"{name!r} is not a source of JudgeBench; these begin with {', '.join(_JUDGE_BENCH)}.")
            grouped[kind][name] = len(rows)
        return {name: parts for name, parts in grouped.items() if parts}
    sections = SECTIONS[benchmark]
    known = [name for parts in sections.values() for name in parts]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise DataError(f"{unknown[0]!r} is not a subset of {benchmark}; known: {', '.join(known)}.")
    return sections


def _summary(
    benchmark: Benchmark, sections: Mapping[str, Mapping[str, int]], means: Means, whole: bool
) -> dict[str, Floats]:
    """Returns every figure from the subsets' means, [..., values of a case]; works on one set of means or on many."""
    per_section: dict[str, Floats] = {}
    for name, parts in sections.items():
        present = {part: weight for part, weight in parts.items() if part in means}
        if present:
            total = sum(present.values())
            per_section[name] = sum((means[part] * (weight / total) for part, weight in present.items()), np.zeros(1))
    sizes = {name: sum(parts.values()) for name, parts in sections.items()}
    weights = sizes if benchmark == "judgebench" else dict.fromkeys(sizes, 1)
    figures: dict[str, Floats] = {}
    if whole:
        total = sum(weights[name] for name in per_section)
        everything = sum((value * (weights[name] / total) for name, value in per_section.items()), np.zeros(1))
        figures |= _difficulties(everything) if benchmark == "rm-bench" else {}
        figures["overall"] = _one(benchmark, everything)
    figures |= {name: _one(benchmark, value) for name, value in per_section.items()}
    subsets = {name: _one(benchmark, value) for name, value in means.items() if name not in figures}
    return figures | subsets


def _one(benchmark: Benchmark, value: Floats) -> Floats:
    if benchmark == "rm-bench":
        return np.mean(list(_difficulties(value).values()), axis=0)  # type: ignore[no-any-return]
    one: Floats = value[..., 0]
    return one


def _difficulties(matrix: Floats) -> dict[str, Floats]:
    """RM-Bench: accuracy by how the styles of the right (row) and the wrong response (column) compare, [..., 9].

    Easy below the diagonal, where the right response is in the fancier style; normal on it; hard above it.
    """
    square = matrix.reshape(*matrix.shape[:-1], STYLES, STYLES)
    rows, columns = np.indices((STYLES, STYLES))
    kinds = {"easy": rows > columns, "normal": rows == columns, "hard": rows < columns}
    return {name: square[..., inside].mean(axis=-1) for name, inside in kinds.items()}
