"""Margins -> temperature, and the quality of the resulting confidences. Pure numpy.

A pair's margin d = reward(chosen) - reward(rejected) gives P(chosen is better) = sigmoid(d / T). The temperature is
fitted on held-out pairs (Guo et al. 2017, arXiv 1706.04599). Training with target margins stretches d, so sigmoid(d)
without a fitted T is not a probability.

Two views of a pair are measured. *P(chosen)* against its label, which is "chosen is better" or a soft target: `nll`
and `brier`. *Confidence* sigmoid(|d| / T), which is at least 0.5, against "ranked right" (d > 0, and half at d = 0):
`expected_calibration_error`, `reliability_bins`, `risk_coverage`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from marginrm.errors import CalibrationError, NonFiniteRewardError
from marginrm.intervals import NORMAL_975
from marginrm.manifest import Calibration, ReliabilityBin, RiskCoveragePoint

Floats = NDArray[np.float64]  # shapes are given where it is used

T_MIN, T_MAX = 1 / 64, 64.0
BINS = 15  # of a reliability diagram, over [0, 1]: those of the literature
_GOLDEN = (math.sqrt(5) - 1) / 2
_VAGUE = 2.0  # an interval whose upper end is this many times the lower one gets a note
_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_COVERAGES = tuple(round(0.05 * step, 2) for step in range(1, 21))


def correctness(margins: ArrayLike) -> Floats:
    """Returns 1 where a margin is positive, 0 where it is negative and 0.5 at a tie, in the shape of `margins`."""
    d = np.asarray(margins, dtype=np.float64)
    right: Floats = (d > 0) + (d == 0) / 2
    return right


def sigmoid(x: ArrayLike) -> Floats:
    """Returns 1 / (1 + exp(-x)) without overflow, in the shape of `x`: exp is taken of numbers that are not positive."""
    x = np.asarray(x, dtype=np.float64)
    odds: Any = np.exp(-np.abs(x))
    result: Floats = np.where(x >= 0, 1.0, odds) / (1.0 + odds)
    return result


def fit_temperature(margins: ArrayLike, targets: ArrayLike | None = None) -> float:
    """Fits T by minimising the negative log likelihood over log T.

    With x = 1/T the loss softplus(-d x) + (1 - p) d x is convex, so it has a single minimum in log T too. Bisection on
    the slope finds it to machine precision.

    Args:
        margins: reward(chosen) - reward(rejected) of each pair, [n].
        targets: P(chosen is better) of each pair, [n]; 1 by default.

    Returns:
        T in [1/64, 64]. A bound is returned where the likelihood has no maximum inside: T -> 0 if every margin has its
        label's sign, T -> infinity if the margins are unrelated to the labels. 1 if all margins are 0, which any T fits.

    Raises:
        CalibrationError: There are no margins, or targets that do not match them.
        NonFiniteRewardError: A margin is NaN or infinite.
    """
    d, p = _checked(margins, targets)
    scale = float(np.max(np.abs(d)))
    if scale == 0:
        return 1.0

    def slope(log_t: float) -> float:
        """dNLL/dx at x = 1/T: mean of d (sigmoid(d x) - p). It falls as T grows."""
        return float(np.mean(d * (sigmoid(d * math.exp(-log_t)) - p)))

    low, high = math.log(T_MIN), math.log(T_MAX)
    if slope(low) <= 0:  # the loss still falls at the smallest T
        return T_MIN
    if slope(high) >= 0:
        return T_MAX
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def temperature_interval(margins: ArrayLike, temperature: float) -> tuple[float, float] | None:
    """Returns the 95% interval of a fitted T, by the curvature of the likelihood in log T (Wald's).

    Args:
        margins: reward(chosen) - reward(rejected) of the pairs that T was fitted on, [n].
        temperature: The fitted T.

    Returns:
        Lower and upper end; None if T is a bound or if the likelihood does not depend on T, as when all margins are 0.
    """
    d, _ = _checked(margins, None)
    z = d / _positive(temperature)
    curvature = float(np.sum(z**2 * sigmoid(z) * sigmoid(-z)))
    if curvature == 0 or not T_MIN < temperature < T_MAX:
        return None
    factor = math.exp(min(NORMAL_975 / math.sqrt(curvature), math.log(T_MAX / T_MIN)))
    return temperature / factor, temperature * factor


def narrowed(margins: ArrayLike, stds: ArrayLike, temperature: float) -> Floats:
    """Returns margins with which sigmoid(margin / T) integrates over their uncertainty, in the shape of `margins`.

    sigmoid(d / sqrt(T^2 + pi / 8 s^2)) is sigmoid(d' / T) of these d' (the probit approximation: MacKay 1992).

    Args:
        margins: reward(chosen) - reward(rejected).
        stds: Standard deviations of the margins.
        temperature: T.
    """
    d, s = np.asarray(margins, dtype=np.float64), np.asarray(stds, dtype=np.float64)
    found: Floats = d / np.sqrt(1.0 + math.pi / 8 * (s / _positive(temperature)) ** 2)
    return found


def fit_uncertain_temperature(margins: ArrayLike, stds: ArrayLike) -> float:
    """Fits T of sigmoid(d / sqrt(T^2 + pi / 8 s^2)), as `fit_temperature` does without standard deviations.

    Args:
        margins: reward(chosen) - reward(rejected) of each pair, [n].
        stds: Standard deviations of the margins, [n].

    Returns:
        T in [1/64, 64], a bound where the likelihood has no maximum inside; 1 if all margins are 0.
    """
    d, _ = _checked(margins, None)
    if not np.any(d):
        return 1.0
    s = np.asarray(stds, dtype=np.float64)

    def loss(log_t: float) -> float:
        return nll(narrowed(d, s, math.exp(log_t)), math.exp(log_t))

    grid = np.linspace(math.log(T_MIN), math.log(T_MAX), 65)
    place = int(np.argmin([loss(float(log_t)) for log_t in grid]))
    low, high = float(grid[max(place - 1, 0)]), float(grid[min(place + 1, len(grid) - 1)])
    for _ in range(60):  # golden section
        first, second = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, second) if loss(first) <= loss(second) else (first, high)
    return min(T_MIN, T_MAX, math.exp((low + high) / 2), key=lambda t: loss(math.log(t)))


def calibrate(
    margins: ArrayLike, temperature: float | None = None, bins: int = BINS, targets: ArrayLike | None = None
) -> Calibration:
    """Fits a temperature, or takes the given one, and measures confidences before (T = 1) and after.

    Args:
        margins: reward(chosen) - reward(rejected) of held-out pairs, [n].
        temperature: T to measure, such as one fitted on other pairs; fitted on these by default.
        bins: Number of bins of the reliability diagram and the ECE.
        targets: As for `fit_temperature`.

    Raises:
        CalibrationError: As for `fit_temperature`.
        NonFiniteRewardError: A margin is NaN or infinite.
        ValueError: The temperature is not positive.
    """
    d, p = _checked(margins, targets)
    t = fit_temperature(d, p) if temperature is None else float(temperature)
    interval = temperature_interval(d, t) if temperature is None else None
    return Calibration(
        temperature=t,
        temperature_interval=interval,
        n=len(d),
        ece_before=expected_calibration_error(d, 1.0, bins),
        ece_after=expected_calibration_error(d, t, bins),
        brier_before=brier(d, 1.0, p),
        brier_after=brier(d, t, p),
        nll_before=nll(d, 1.0, p),
        nll_after=nll(d, t, p),
        reliability=reliability_bins(d, t, bins),
        reliability_before=reliability_bins(d, 1.0, bins),
        risk_coverage=risk_coverage(d, t),
        margin_quantiles={f"{q:g}": float(v) for q, v in zip(_QUANTILES, np.quantile(d, _QUANTILES), strict=True)},
        note=_note(d, t, interval) if temperature is None else None,
    )


def calibrate_uncertain(margins: ArrayLike, stds: ArrayLike, temperature: float | None = None) -> Calibration:
    """Fits T beside the uncertainty of the margins, or takes the given one, and measures confidences as `calibrate` does.

    Args:
        margins: reward(chosen) - reward(rejected) of held-out pairs, [n].
        stds: Standard deviations of the margins, [n].
        temperature: T to measure; fitted on these pairs by default.
    """
    t = fit_uncertain_temperature(margins, stds) if temperature is None else temperature
    plain = calibrate(margins, temperature=t)
    after = calibrate(narrowed(margins, stds, t), temperature=t)
    interval = temperature_interval(narrowed(margins, stds, t), t) if temperature is None else None
    measured = ("ece_after", "brier_after", "nll_after", "reliability", "risk_coverage")
    found = {name: getattr(after, name) for name in measured} | {"temperature_interval": interval}
    if temperature is None:
        found["note"] = _note(np.asarray(margins, dtype=np.float64), t, interval)
    return plain.model_copy(update=found)


def area_under_risk_coverage(margins: ArrayLike, stds: ArrayLike | None = None, temperature: float = 1.0) -> float:
    """Returns the mean error rate among the k most confident pairs over all k (AURC: Geifman et al. 2019), in [0, 1].

    Pairs of equal confidence count by their mean error.

    Args:
        margins: reward(chosen) - reward(rejected), [n].
        stds: Standard deviations of the margins, [n]; without them the order of confidence is that of the margins' size.
        temperature: T, which matters for the order only beside standard deviations.
    """
    d = np.asarray(margins if stds is None else narrowed(margins, stds, temperature), dtype=np.float64)
    d, _ = _checked(d, None)
    return float(np.mean(_cumulative_errors(d) / np.arange(1, len(d) + 1)))


def nll(margins: ArrayLike, temperature: float = 1.0, targets: ArrayLike | None = None) -> float:
    """Returns the mean negative log likelihood of the labels in nats: -p log s - (1 - p) log(1 - s), s = sigmoid(d / T)."""
    d, p = _checked(margins, targets)
    logits = d / _positive(temperature)
    return float(np.mean(np.logaddexp(0.0, -logits) + (1 - p) * logits))


def brier(margins: ArrayLike, temperature: float = 1.0, targets: ArrayLike | None = None) -> float:
    """Returns the mean squared difference of P(chosen) and the label, in [0, 1] (Brier 1950); 0.25 for a constant 0.5."""
    d, p = _checked(margins, targets)
    return float(np.mean((sigmoid(d / _positive(temperature)) - p) ** 2))


def expected_calibration_error(margins: ArrayLike, temperature: float = 1.0, bins: int = BINS) -> float:
    """Returns the ECE in [0, 1]: the mean over pairs of their bin's |accuracy - confidence| (Naeini et al. 2015)."""
    return error_of(reliability_bins(margins, temperature, bins))


def error_of(table: Sequence[ReliabilityBin]) -> float:
    """Returns the ECE of a reliability diagram, in [0, 1]; 0 without any count."""
    total = sum(row.count for row in table)
    return sum(
        row.count / total * abs(row.accuracy - row.confidence)
        for row in table
        if row.accuracy is not None and row.confidence is not None
    )


def reliability_bins(margins: ArrayLike, temperature: float = 1.0, bins: int = BINS) -> list[ReliabilityBin]:
    """Sorts pairs by confidence into equal-width bins over [0, 1].

    Confidence is at least 0.5, so the lower half of the bins stays empty; these are the bins of the literature, which
    makes figures comparable. A bin includes its lower edge; the last includes both edges.

    Raises:
        ValueError: `bins` is less than 1 or the temperature is not positive.
    """
    d, _ = _checked(margins, None)
    if bins < 1:
        raise ValueError(f"bins = {bins}: it must be at least 1.")
    return bins_of(_confidence(d, temperature), correctness(d), bins)


def bins_of(sure: Floats, right: Floats, bins: int = BINS) -> list[ReliabilityBin]:
    """Sorts probabilities into equal-width bins over [0, 1], beside what came true.

    Args:
        sure: Probabilities, [n].
        right: 1 where the event happened, 0 where not, and shares between, [n].
        bins: Number of bins.
    """
    place = np.minimum((sure * bins).astype(np.int64), bins - 1)
    table = []
    for index in range(bins):
        here = place == index
        count = int(here.sum())
        table.append(
            ReliabilityBin(
                lower=index / bins,
                upper=(index + 1) / bins,
                count=count,
                confidence=math.fsum(sure[here]) / count if count else None,
                accuracy=math.fsum(right[here]) / count if count else None,
            )
        )
    return table


def risk_coverage(margins: ArrayLike, temperature: float = 1.0) -> list[RiskCoveragePoint]:
    """Returns the error rate among the most confident share of pairs, for shares of 5%, 10%, ... 100%.

    Pairs of equal confidence at the edge of a share count by their mean error, so the order of the input does not matter.
    """
    d, _ = _checked(margins, None)
    magnitude, cumulative = -np.sort(-np.abs(d)), _cumulative_errors(d)
    points = []
    for coverage in _COVERAGES:
        kept = max(1, math.ceil(coverage * len(d) - 1e-9))
        points.append(
            RiskCoveragePoint(
                coverage=kept / len(d),
                risk=min(1.0, max(0.0, float(cumulative[kept - 1]) / kept)),
                confidence=float(_confidence(magnitude[kept - 1 : kept], temperature)[0]),
            )
        )
    return points


def _cumulative_errors(d: Floats) -> Floats:
    """Returns the errors among the 1, 2, ... most confident pairs, [n]; equal confidences count by their mean error."""
    order = np.argsort(-np.abs(d), kind="stable")
    magnitude, wrong = np.abs(d)[order], 1.0 - correctness(d)[order]
    levels, first, counts = np.unique(-magnitude, return_index=True, return_counts=True)
    per_level = np.add.reduceat(wrong, first) / counts
    return np.cumsum(per_level[np.repeat(np.arange(len(levels)), counts)])


def _note(d: Floats, temperature: float, interval: tuple[float, float] | None) -> str | None:
    if not np.any(d):
        return "All margins are 0, so any temperature fits; T = 1 was kept."
    if temperature <= T_MIN:
        return "T is at its lower bound: nearly every pair was ranked right. Calibrate on more or harder pairs."
    if temperature >= T_MAX:
        return "T is at its upper bound: the margins are almost unrelated to these labels."
    if interval and interval[1] > _VAGUE * interval[0]:
        return (
            f"These {len(d):,} pairs determine T only to between {interval[0]:.2f} and {interval[1]:.2f} (95%). Calibrate "
            "on more pairs, similar to those to be scored."
        )
    return None


def _checked(margins: ArrayLike, targets: ArrayLike | None) -> tuple[Floats, Floats]:
    d: Floats = np.asarray(margins, dtype=np.float64)
    if d.ndim != 1 or d.size == 0:
        raise CalibrationError(f"Calibration needs a list of at least one margin, got shape {d.shape}.")
    if not np.all(np.isfinite(d)):
        raise NonFiniteRewardError(f"{int(np.sum(~np.isfinite(d)))} of {d.size} margins are NaN or infinite.")
    p: Floats = np.ones_like(d) if targets is None else np.asarray(targets, dtype=np.float64)
    if p.shape != d.shape or not np.all((p >= 0) & (p <= 1)):
        raise CalibrationError(f"Targets must be one probability per margin, got shape {p.shape} for {d.shape}.")
    return d, p


def _positive(temperature: float) -> float:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature = {temperature}: it must be a positive number.")
    return temperature


def _confidence(d: Floats, temperature: float) -> Floats:
    return sigmoid(np.abs(d) / _positive(temperature))


def _right(d: Floats) -> Floats:
    result: Floats = np.where(d > 0, 1.0, np.where(d == 0, 0.5, 0.0))
    return result
