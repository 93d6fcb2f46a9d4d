"""Best-of-N: the quality of the candidate that a reward model picks among n, for every n up to the group's size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from marginrm.calibration import Floats
from marginrm.errors import DataError
from marginrm_training.evaluation.bootstrap import mean_interval

DEFAULT_NS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class BestOfNPoint:
    """Mean gold quality of the pick among n candidates.

    Attributes:
        n: Number of candidates.
        kl: log n - (n - 1) / n nats, an upper bound on the KL divergence of Best-of-n from the base policy.
        model: Quality of the reward model's pick.
        model_low: Lower end of its 95% bootstrap interval over prompts.
        model_high: Upper end.
        longest: Quality of the longest text.
        oracle: Quality of the best candidate.
        random: Mean quality of all candidates.
    """

    n: int
    kl: float
    model: float
    model_low: float
    model_high: float
    longest: float
    oracle: float
    random: float


def expected_best_of_n(scores: Sequence[float], gold: Sequence[float], n: int) -> float:
    """Returns the expected gold quality of the highest-scored of n candidates drawn without replacement from all.

    The unbiased order-statistic estimator: with candidates sorted by score, the i-th of M (from 1) is the best of a
    random n-subset with probability C(i-1, n-1) / C(M, n). Equal scores keep the lower index, as serving does.

    Args:
        scores: Rewards of the M candidates.
        gold: Their gold qualities.
        n: Subset size, 1 to M.
    """
    total = len(scores)
    if not 1 <= n <= total:
        raise ValueError(f"n = {n} with {total} candidates")
    # Ascending, and of equal scores the lower index later, so that it wins.
    order = sorted(range(total), key=lambda index: (scores[index], -index))
    logs = [
        _log_choose(rank - 1, n - 1) - _log_choose(total, n) if rank >= n else -math.inf for rank in range(1, total + 1)
    ]
    return math.fsum(math.exp(log) * gold[index] for log, index in zip(logs, order, strict=True))


def best_of_n_curve(
    rewards: Sequence[Sequence[float]],
    gold: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]],
    ns: Sequence[int] = DEFAULT_NS,
) -> list[BestOfNPoint]:
    """Returns the curve over prompts for every n that all prompts have candidates for.

    Every point is thus a mean over the same prompts, and the curve ends at the smallest group (`shortest_group`).

    Args:
        rewards: For each prompt, the candidates' rewards.
        gold: For each prompt, their gold qualities.
        lengths: For each prompt, their lengths in characters.
        ns: The values of n.

    Raises:
        DataError: There are no prompts.
    """
    if not gold:
        raise DataError("Best-of-N needs at least one prompt with candidates. Is the file empty?")
    points = []
    for n in ns:
        if n > shortest_group(gold):
            break
        model = _expected(rewards, gold, n)
        low, high = mean_interval(model)
        points.append(
            BestOfNPoint(
                n=n,
                kl=math.log(n) - (n - 1) / n,
                model=_mean(model),
                model_low=low,
                model_high=high,
                longest=_mean(_expected(lengths, gold, n)),
                oracle=_mean(_expected(gold, gold, n)),
                random=_mean([_mean(truth) for truth in gold]),
            )
        )
    return points


def shortest_group(gold: Sequence[Sequence[float]]) -> int:
    """Returns the number of candidates of the smallest group, where the curve ends."""
    return min(len(group) for group in gold)


def curve_end(points: Sequence[BestOfNPoint], gold: Sequence[Sequence[float]]) -> str | None:
    """Returns a sentence on where a curve ends before the last of `DEFAULT_NS`, and why; None if it does not."""
    last = points[-1].n
    if last >= DEFAULT_NS[-1]:
        return None
    longer = sum(len(group) > last for group in gold)
    return (
        f"the curve ends at N = {last}: the shortest group has {shortest_group(gold)} candidates "
        f"({longer:,} of {len(gold):,} prompts have more than {last})"
    )


def _expected(scores: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], n: int) -> Floats:
    """Returns the expected quality of the pick of each prompt, [prompts]."""
    return np.array([expected_best_of_n(group, truth, n) for group, truth in zip(scores, gold, strict=True)])


def _mean(values: Sequence[float] | Floats) -> float:
    return float(np.mean(values))


def _log_choose(total: int, chosen: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
