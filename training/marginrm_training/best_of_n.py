"""Best-of-N: how good the candidate is that a reward model picks among n, for every n up to the number at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DEFAULT_NS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class BestOfNPoint:
    """Mean gold quality of the pick among n candidates.

    Attributes:
        n: Number of candidates.
        kl: log n - (n - 1) / n nats, an upper bound on how far Best-of-n moves from the base policy.
        model: With the reward model's pick.
        longest: With the longest text.
        oracle: With the best by gold quality.
        random: With any candidate.
    """

    n: int
    kl: float
    model: float
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

    Args:
        rewards: For each prompt, the candidates' rewards.
        gold: For each prompt, their gold qualities.
        lengths: For each prompt, their lengths in characters.
        ns: The values of n.
    """
    smallest = min(len(group) for group in gold)
    return [
        BestOfNPoint(
            n=n,
            kl=math.log(n) - (n - 1) / n,
            model=_mean([expected_best_of_n(group, truth, n) for group, truth in zip(rewards, gold, strict=True)]),
            longest=_mean([expected_best_of_n(group, truth, n) for group, truth in zip(lengths, gold, strict=True)]),
            oracle=_mean([expected_best_of_n(truth, truth, n) for truth in gold]),
            random=_mean([_mean(truth) for truth in gold]),
        )
        for n in ns
        if n <= smallest
    ]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _log_choose(total: int, chosen: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
