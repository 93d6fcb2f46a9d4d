"""Two checkpoints on the same pairs: is the difference more than chance?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from marginrm.errors import DataError

Floats = NDArray[np.float64]


def common(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[Floats, Floats]:
    """Returns two models' margins of the pairs that both could read, in one order.

    Args:
        first: Source (`path:line`) of each pair to the first model's margin.
        second: The second model's.

    Raises:
        DataError: They have no pair in common.
    """
    shared = [source for source in first if source in second]
    if not shared:
        raise DataError("The two models could read no pair in common; their limits of length may be too far apart.")
    return np.array([first[source] for source in shared]), np.array([second[source] for source in shared])


def compare(first: Floats, second: Floats, *, resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Compares two models' margins on the same pairs.

    Args:
        first: Margins of the first model, [pairs].
        second: Margins of the second, same pairs, same order.
        resamples: Bootstrap samples of the pairs.
        seed: Of the bootstrap.

    Returns:
        Both accuracies (ties half), their difference (second - first) with a 95% paired-bootstrap interval, and the
        two-sided exact McNemar p-value over the pairs on which just one of them is right (a tie is not right there).
    """
    if first.shape != second.shape:
        raise ValueError(f"{first.shape} and {second.shape}: not the same pairs")
    right = [(margins > 0) + (margins == 0) / 2 for margins in (first, second)]
    difference = right[1] - right[0]
    generator = np.random.default_rng(seed)
    samples = difference[generator.integers(0, len(difference), (resamples, len(difference)))].mean(axis=1)
    only_first = int(((first > 0) & (second <= 0)).sum())
    only_second = int(((second > 0) & (first <= 0)).sum())
    return {
        "pairs": float(len(difference)),
        "accuracy_first": float(right[0].mean()),
        "accuracy_second": float(right[1].mean()),
        "difference": float(difference.mean()),
        "difference_low": float(np.quantile(samples, 0.025)),
        "difference_high": float(np.quantile(samples, 0.975)),
        "only_first_right": float(only_first),
        "only_second_right": float(only_second),
        "mcnemar_p": mcnemar(only_first, only_second),
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the exact two-sided p-value that the discordant pairs fall like a fair coin (McNemar, 1947)."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, count) for count in range(fewer + 1)) / (1 << total)
    return min(1.0, 2 * tail)
