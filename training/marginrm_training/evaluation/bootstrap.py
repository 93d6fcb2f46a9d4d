"""Bootstrap intervals (Efron, 1979): the spread of a figure over other pairs or prompts from the same source."""

from __future__ import annotations

import numpy as np

from marginrm.calibration import Floats, brier, correctness, nll

Estimate = tuple[float, float, float]  # a figure, and the lower and the upper end of its interval
RESAMPLES = 2000
_LEVELS = (0.025, 0.975)


def mean_interval(values: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Returns the 95% percentile interval of the mean of values [n]; equal values and seeds give equal intervals."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, _LEVELS)
    return float(low), float(high)


def seeds_estimate(values: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Returns the mean of values [seeds, items] and its 95% percentile interval, with seeds and items resampled.

    With few seeds the interval understates the spread over seeds; show the seeds' own deviation beside it.
    """
    generator = np.random.default_rng(seed)
    seeds, items = values.shape
    means = np.empty(resamples)
    for index in range(resamples):
        drawn = values[generator.integers(0, seeds, seeds)].mean(axis=0)
        means[index] = drawn[generator.integers(0, items, items)].mean()
    low, high = np.quantile(means, _LEVELS)
    return float(values.mean()), float(low), float(high)


def evaluation_intervals(
    d: Floats, temperature: float, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, float]:
    """Returns `NAME_low` and `NAME_high` of the main figures of `pairs.evaluate`, with pairs resampled.

    The ECE has no interval: its estimate is biased upwards, more so with fewer different pairs, and a resample has
    fewer, so the percentiles would lie above the figure itself.

    Args:
        d: Margins, [pairs].
        temperature: T of the confidence.
        resamples: Bootstrap samples.
        seed: Seed of their draw.
    """
    generator = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {}
    for _ in range(resamples):
        drawn = d[generator.integers(0, len(d), len(d))]
        for name, value in {
            "accuracy": correctness(drawn).mean(),
            "accuracy_strict": (drawn > 0).mean(),
            "bt_nll": nll(drawn),
            "nll": nll(drawn, temperature),
            "brier_before": brier(drawn),
            "brier": brier(drawn, temperature),
            "margin_mean": drawn.mean(),
        }.items():
            samples.setdefault(name, []).append(float(value))
    found: dict[str, float] = {}
    for name, values in samples.items():
        low, high = np.quantile(values, _LEVELS)
        found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return found
