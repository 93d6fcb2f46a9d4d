"""Results of two revisions for the same rows -> figures of agreement, drift, calibration and time. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from marginrm import intervals
from marginrm.bulk.rows import InputRow
from marginrm.calibration import Floats, bins_of, correctness, error_of
from marginrm.rollout.revisions import Scored

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95% interval, over rows like these."""

    value: float
    low: float
    high: float


@dataclass(slots=True)
class Results:
    """The results of both revisions, and their times.

    Attributes:
        rows: Rows that both have scored.
        old: The results of the present revision, one per row.
        new: Those of the new one.
        unreadable: Rows that were not sent, because they cannot be read.
        neither: Rows that neither can score.
        lost: Rows that only the present revision can score, by the new one's error.
        gained: Rows that only the new one can score.
        seconds: Time of each batch, of the present and of the new revision.
    """

    rows: list[InputRow] = field(default_factory=list)
    old: list[Scored] = field(default_factory=list)
    new: list[Scored] = field(default_factory=list)
    unreadable: int = 0
    neither: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    gained: int = 0
    seconds: list[tuple[float, float]] = field(default_factory=list)

    def add(self, rows: Sequence[InputRow], old: Sequence[Scored], new: Sequence[Scored]) -> None:
        """Adds the results of a batch."""
        for row, before, after in zip(rows, old, new, strict=True):
            if before.error and after.error:
                self.neither += 1
            elif after.error:
                self.lost[after.error] = self.lost.get(after.error, 0) + 1
            elif before.error:
                self.gained += 1
            else:
                self.rows.append(row)
                self.old.append(before)
                self.new.append(after)

    def of_kind(self, kind: str) -> Iterator[tuple[Scored, Scored]]:
        """Yields both results of the rows of a kind."""
        for row, before, after in zip(self.rows, self.old, self.new, strict=True):
            if row.kind == kind:
                yield before, after


def wilson(share: float, n: int) -> Estimate:
    """Returns a mean of n values in [0, 1] with its 95% interval (Wilson 1927).

    It is the interval of a share of successes. For values between 0 and 1 it is too wide rather than too narrow, because
    their variance is at most that of successes.
    """
    return Estimate(share, *intervals.wilson(share, n))


def preference_agreement(results: Results) -> Estimate | None:
    """Returns the share of preferences on which both revisions agree, averaged over pairs and groups; None without any.

    A group counts by the share of its pairs of candidates (concordance). A tie against a preference counts half.
    """
    shares = [
        _concordance(before.rewards, after.rewards)
        for before, after in zip(results.old, results.new, strict=True)
        if len(before.rewards) > 1
    ]
    return wilson(float(np.mean(shares)), len(shares)) if shares else None


def pick_agreement(results: Results) -> Estimate | None:
    """Returns the share of groups of which both revisions pick the same candidate; None without a group of two or more."""
    same = [
        float(np.argmax(before.rewards) == np.argmax(after.rewards))
        for before, after in results.of_kind("group")
        if len(before.rewards) > 1
    ]
    return wilson(float(np.mean(same)), len(same)) if same else None


def shift(old: ArrayLike, new: ArrayLike) -> float:
    """Returns the standardised mean difference: (mean of new - mean of old) / pooled standard deviation (Cohen's d)."""
    before, after = np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)
    difference = float(after.mean() - before.mean())
    pooled = math.sqrt((before.var() + after.var()) / 2)
    if pooled == 0:
        return 0.0 if difference == 0 else math.copysign(math.inf, difference)
    return difference / pooled


def kolmogorov_smirnov(old: ArrayLike, new: ArrayLike) -> float:
    """Returns the largest distance of two empirical distribution functions, in [0, 1] (Smirnov 1939)."""
    before, after = (np.sort(np.asarray(values, dtype=np.float64)) for values in (old, new))
    everywhere = np.concatenate([before, after])
    below = [np.searchsorted(values, everywhere, side="right") / len(values) for values in (before, after)]
    return float(np.max(np.abs(below[0] - below[1])))


def all_rewards(results: Results) -> tuple[Floats, Floats]:
    """Returns the rewards of both revisions, each [responses]."""
    old, new = ([reward for one in side for reward in one.rewards] for side in (results.old, results.new))
    return np.array(old), np.array(new)


def margins(results: Results, temperatures: tuple[float, float]) -> tuple[Floats, Floats]:
    """Returns margins over T of both revisions, each [pairs and groups]; that of a group is its best minus its runner-up.

    Args:
        results: The results.
        temperatures: T of the present and of the new revision.
    """
    kinds = [row.kind for row in results.rows]
    old, new = (
        [_margin(kind, one) / t for kind, one in zip(kinds, side, strict=True) if len(one.rewards) > 1]
        for side, t in zip((results.old, results.new), temperatures, strict=True)
    )
    return np.array(old), np.array(new)


def accuracy(results: Results) -> tuple[float, float, Estimate] | None:
    """Returns both accuracies on labelled pairs, and their difference (new - old) with its paired interval."""
    pairs = list(results.of_kind("pair"))
    if not pairs:
        return None
    old, new = (correctness([_margin("pair", one) for one in side]) for side in zip(*pairs, strict=True))
    gained = new - old
    half = intervals.NORMAL_975 * float(gained.std()) / math.sqrt(len(gained))
    mean = float(gained.mean())
    return float(old.mean()), float(new.mean()), Estimate(mean, mean - half, mean + half)


def calibration_errors(results: Results) -> tuple[float, float] | None:
    """Returns the expected calibration error of both revisions' confidences on labelled pairs; None without a pair."""
    pairs = list(results.of_kind("pair"))
    if not pairs:
        return None
    old, new = (_ece(side) for side in zip(*pairs, strict=True))
    return old, new


def time_ratio(seconds: Sequence[tuple[float, float]], seed: int = 0) -> Estimate | None:
    """Returns the new revision's time over the present one's, with its bootstrap interval over batches; None without any."""
    if not seconds:
        return None
    times: NDArray[np.float64] = np.array(seconds)
    generator = np.random.default_rng(seed)
    drawn = times[generator.integers(0, len(times), (_RESAMPLES, len(times)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 1] / drawn[:, 0], (0.025, 0.975))
    old, new = times.sum(axis=0)
    return Estimate(float(new / old), float(low), float(high))


def _concordance(old: Sequence[float], new: Sequence[float]) -> float:
    """Returns the share of pairs of responses that both put in the same order, a tie against an order being half."""
    signs = np.array(
        [(np.sign(old[i] - old[j]), np.sign(new[i] - new[j])) for i, j in combinations(range(len(old)), 2)]
    )
    return float(1 - np.abs(signs[:, 0] - signs[:, 1]).mean() / 2)


def _margin(kind: str, scored: Scored) -> float:
    if kind == "pair":
        return scored.rewards[0] - scored.rewards[1]
    second, best = sorted(scored.rewards)[-2:]
    return best - second


def _ece(pairs: Sequence[Scored]) -> float:
    chosen = np.array([one.confidence for one in pairs], dtype=np.float64)
    right = correctness([_margin("pair", one) for one in pairs])
    return error_of(bins_of(np.maximum(chosen, 1 - chosen), right))
