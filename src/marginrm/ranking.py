"""Rewards -> margins, confidences, verdicts and rankings. Pure functions for library, service and reports.

The confidence is the Bradley-Terry probability that one response is better than the other, scaled by the checkpoint's
temperature: P = sigmoid(margin / T) (temperature scaling: Guo et al. 2017, arXiv 1706.04599). For N candidates it
generalises to Luce's choice probability, P(i is best) = exp(r_i / T) / sum_j exp(r_j / T).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from marginrm.errors import NonFiniteRewardError

Verdict = Literal["chosen", "rejected", "tie"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses to one prompt, compared.

    Attributes:
        margin: reward(chosen) - reward(rejected); negative if the model disagrees with the labels.
        confidence: Calibrated P(chosen is better), in [0, 1].
        verdict: The response that the model prefers, or `tie`.
        chosen: Reward of the chosen response.
        rejected: Reward of the rejected response.
    """

    margin: float
    confidence: float
    verdict: Verdict
    chosen: float
    rejected: float


@dataclass(frozen=True, slots=True)
class RankedCandidate:
    """One candidate in a ranking.

    Attributes:
        candidate: Index of the candidate as it was given, from 0.
        rank: 1 for the best. Equal rewards get different ranks, the lower index first.
        reward: Reward of the candidate.
        p_best: Luce choice probability that the candidate is the best of all.
    """

    candidate: int
    rank: int
    reward: float
    p_best: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """The candidates of one prompt, best first.

    Attributes:
        best: Index of the best candidate.
        margin: Reward of the best minus that of the runner-up; None with a single candidate.
        confidence: P(best is better than the runner-up); None with a single candidate.
        tie: True if that confidence is below `tie_below`, or if the two rewards are equal.
        ranking: The first `top_k` candidates, or all.
        mean: Mean reward over all candidates.
        std: Population standard deviation of the rewards of all candidates.
    """

    best: int
    margin: float | None
    confidence: float | None
    tie: bool
    ranking: tuple[RankedCandidate, ...]
    mean: float
    std: float


def sigmoid(x: float) -> float:
    """Returns 1 / (1 + exp(-x)) without overflow: exp is taken of a number that is not positive.

    `calibration.sigmoid` is the same for arrays; this module does without numpy, as the client does.
    """
    odds = math.exp(-abs(x))
    return 1.0 / (1.0 + odds) if x >= 0 else odds / (1.0 + odds)


def confidence(margin: float, temperature: float = 1.0) -> float:
    """Returns P(chosen is better) = sigmoid(margin / T), without overflow.

    Raises:
        NonFiniteRewardError: The margin is NaN or infinite.
        ValueError: The temperature is not a positive number.
    """
    if not math.isfinite(margin):
        raise NonFiniteRewardError(f"The margin is {margin}; a confidence needs a finite one.")
    _check_temperature(temperature)
    return sigmoid(margin / temperature)


def verdict(margin: float, temperature: float = 1.0, tie_below: float = 0.5) -> Verdict:
    """Returns the response that the model prefers, or `tie`.

    Args:
        margin: reward(chosen) - reward(rejected).
        temperature: T of the confidence.
        tie_below: The result is a tie if the confidence is below this in both directions; at 0.5, only for a margin of 0.

    Raises:
        NonFiniteRewardError: The margin is NaN or infinite.
        ValueError: `temperature` is not positive or `tie_below` is not in [0.5, 1).
    """
    if not 0.5 <= tie_below < 1.0:
        raise ValueError(f"tie_below = {tie_below}: it must be at least 0.5 and less than 1.")
    if confidence(abs(margin), temperature) < tie_below or margin == 0:
        return "tie"
    return "chosen" if margin > 0 else "rejected"


def compare(chosen: float, rejected: float, temperature: float = 1.0, tie_below: float = 0.5) -> Comparison:
    """Compares the rewards of two responses to one prompt.

    Raises:
        NonFiniteRewardError: A reward is NaN or infinite.
        ValueError: As for `verdict`.
    """
    _check_rewards((chosen, rejected))
    margin = chosen - rejected
    return Comparison(
        margin=margin,
        confidence=confidence(margin, temperature),
        verdict=verdict(margin, temperature, tie_below),
        chosen=chosen,
        rejected=rejected,
    )


def rank(
    rewards: Sequence[float], temperature: float = 1.0, tie_below: float = 0.5, top_k: int | None = None
) -> Ranking:
    """Ranks the candidates of one prompt by reward.

    Args:
        rewards: One reward per candidate; at least one.
        temperature: T of the confidences.
        tie_below: As for `verdict`, between the best and the runner-up.
        top_k: Number of candidates in `ranking`; all by default. `mean`, `std` and `p_best` are always over all.

    Raises:
        NonFiniteRewardError: A reward is NaN or infinite.
        ValueError: There is no candidate, `top_k` is less than 1, or as for `verdict`.
    """
    if not rewards:
        raise ValueError("There is no candidate to rank.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: it must be at least 1.")
    _check_rewards(rewards)
    _check_temperature(temperature)
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])  # stable: equal rewards keep their order
    top = rewards[order[0]]
    weights = [math.exp((reward - top) / temperature) for reward in rewards]
    total = math.fsum(weights)
    mean = math.fsum(rewards) / len(rewards)
    first_two = compare(top, rewards[order[1]], temperature, tie_below) if len(order) > 1 else None
    return Ranking(
        best=order[0],
        margin=first_two.margin if first_two else None,
        confidence=first_two.confidence if first_two else None,
        tie=first_two is not None and first_two.verdict == "tie",
        ranking=tuple(
            RankedCandidate(candidate=index, rank=place, reward=rewards[index], p_best=weights[index] / total)
            for place, index in enumerate(order[:top_k], start=1)
        ),
        mean=mean,
        std=math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)),
    )


def _check_rewards(rewards: Sequence[float]) -> None:
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise NonFiniteRewardError(f"Reward {index} is {reward}; only finite rewards can be compared.")


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature = {temperature}: it must be a positive number.")
