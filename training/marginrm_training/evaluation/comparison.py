"""Two checkpoints on the same pairs or candidates: the difference, its interval, and an exact test against chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from marginrm.calibration import Floats, correctness
from marginrm.errors import DataError
from marginrm_training.evaluation.bootstrap import mean_interval


def common(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[Floats, Floats]:
    """Returns two models' margins of the pairs that both can read, in one order.

    Args:
        first: The first model's margins by the pair's source, `path:line`.
        second: The second model's margins.

    Raises:
        DataError: They have no pair in common.
    """
    shared = [source for source in first if source in second]
    if not shared:
        raise DataError("The two models can read no pair in common. Use pairs that fit into the length limits of both.")
    return np.array([first[source] for source in shared]), np.array([second[source] for source in shared])


def compare(first: Floats, second: Floats) -> dict[str, float]:
    """Compares two models' margins on the same pairs.

    Args:
        first: Margins of the first model, [pairs].
        second: Margins of the second, same pairs, same order.

    Returns:
        Both accuracies (ties half), their difference (second - first) with a 95% paired-bootstrap interval, and the
        two-sided exact McNemar p-value over the pairs that only one model ranks right (a tie is not right there).
    """
    if first.shape != second.shape:
        raise ValueError(f"{first.shape} and {second.shape}: not the same pairs")
    right = [correctness(margins) for margins in (first, second)]
    difference = right[1] - right[0]
    low, high = mean_interval(difference)
    only_first, only_second = discordant(first, second)
    return {
        "pairs": float(len(difference)),
        "accuracy_first": float(right[0].mean()),
        "accuracy_second": float(right[1].mean()),
        "difference": float(difference.mean()),
        "difference_low": low,
        "difference_high": high,
        "only_first_right": float(only_first),
        "only_second_right": float(only_second),
        "mcnemar_p": mcnemar(only_first, only_second),
    }


def compare_picks(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], gold: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Compares two models' picks among the same candidates (Best-of-N with all of them).

    Args:
        first: For each prompt, the first model's rewards; of equal rewards the lower index is picked.
        second: The second model's.
        gold: The candidates' gold qualities.

    Returns:
        `win_rate` of the second's picks over the first's: its wins and half of the draws, over all `prompts`. Also its
        counts (`draws` include `same_pick`), the mean quality of both models' picks and the difference, 95%
        paired-bootstrap intervals over prompts, and the p of a sign test (McNemar's) over the prompts without a draw.
    """
    picks = [np.array([int(np.argmax(group)) for group in rewards]) for rewards in (first, second)]
    quality = [np.array([truth[int(one)] for truth, one in zip(gold, pick, strict=True)]) for pick in picks]
    difference = quality[1] - quality[0]
    score = correctness(difference)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    low, high = mean_interval(score)
    quality_low, quality_high = mean_interval(difference)
    return {
        "prompts": float(len(gold)),
        "second_wins": float(wins),
        "first_wins": float(losses),
        "draws": float(len(gold) - wins - losses),
        "same_pick": float((picks[0] == picks[1]).sum()),
        "win_rate": float(score.mean()),
        "win_rate_low": low,
        "win_rate_high": high,
        "win_rate_p": mcnemar(losses, wins),
        "pick_first": float(quality[0].mean()),
        "pick_second": float(quality[1].mean()),
        "pick_difference": float(difference.mean()),
        "pick_difference_low": quality_low,
        "pick_difference_high": quality_high,
    }


def discordant(first: Floats, second: Floats) -> tuple[int, int]:
    """Returns the numbers of pairs that only the first and only the second model ranks right; a tie is not right."""
    return int(((first > 0) & (second <= 0)).sum()), int(((second > 0) & (first <= 0)).sum())


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns McNemar's exact two-sided p-value (1947): each model wins a discordant pair with probability 1/2."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, count) for count in range(fewer + 1)) / (1 << total)
    return min(1.0, 2 * tail)
