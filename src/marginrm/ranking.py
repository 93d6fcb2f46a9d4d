"""Rewards -> margins, confidences, verdicts and rankings. Pure functions for library, service and reports.

The confidence is the Bradley-Terry probability that one response is better than the other, scaled by the checkpoint's
temperature: P = sigmoid(margin / T) (temperature scaling: Guo et al. 2017, arXiv 1706.04599). For N candidates it
generalises to Luce's choice probability, P(i is best) = exp(r_i / T) / sum_j exp(r_j / T).

Rewards that carry their uncertainty (`UncertainReward`) widen the temperature of each margin by its standard deviation.
A `GroupTemperature` replaces T where the best of N was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from marginrm.confidence.group_temperature import GroupTemperature
from marginrm.confidence.uncertain_reward import UncertainReward, familiarity_of, margin_std, widened
from marginrm.errors import NonFiniteRewardError, NoUncertaintyError

Verdict = Literal["chosen", "rejected", "tie"]
Source = Literal["pairs", "groups"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses to one prompt, compared.

    Attributes:
        margin: reward(chosen) - reward(rejected); negative if the model disagrees with the labels.
        confidence: Calibrated P(chosen is better), in [0, 1].
        verdict: The response that the model prefers, or `tie`.
        chosen: Reward of the chosen response.
        rejected: Reward of the rejected response.
        margin_std: Standard deviation of the margin; None for a model without.
    """

    margin: float
    confidence: float
    verdict: Verdict
    chosen: float
    rejected: float
    margin_std: float | None = None


@dataclass(frozen=True, slots=True)
class RankedCandidate:
    """One candidate in a ranking.

    Attributes:
        candidate: Index of the candidate as it was given, from 0.
        rank: 1 for the best. Equal rewards get different ranks, the lower index first.
        reward: Reward of the candidate.
        p_best: Luce choice probability that the candidate is the best of all.
        familiarity: How like the calibration texts it is, in [0, 1]; None for a model without.
    """

    candidate: int
    rank: int
    reward: float
    p_best: float
    familiarity: float | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """The candidates of one prompt, best first.

    Attributes:
        best: Index of the best candidate.
        margin: Reward of the best minus that of the runner-up; None with a single candidate. Negative only if the ranking
            is averse to risk.
        confidence: P(best is better than the runner-up); None with a single candidate.
        tie: True if that confidence is below `tie_below`, or if the two rewards are equal.
        ranking: The first `top_k` candidates, or all.
        mean: Mean reward over all candidates.
        std: Population standard deviation of the rewards of all candidates.
        margin_std: Standard deviation of the margin; None with a single candidate, or for a model without.
        confidence_from: `groups` if the temperatures are those of chosen maxima, `pairs` if it is that of given pairs.
    """

    best: int
    margin: float | None
    confidence: float | None
    tie: bool
    ranking: tuple[RankedCandidate, ...]
    mean: float
    std: float
    margin_std: float | None = None
    confidence_from: Source = "pairs"


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
    _check_temperature(temperature)
    margin, std = chosen - rejected, margin_std(chosen, rejected)
    scale = widened(temperature, std)
    return Comparison(
        margin=margin,
        confidence=confidence(margin, scale),
        verdict=verdict(margin, scale, tie_below),
        chosen=chosen,
        rejected=rejected,
        margin_std=std,
    )


def rank(
    rewards: Sequence[float],
    temperature: float = 1.0,
    tie_below: float = 0.5,
    top_k: int | None = None,
    *,
    groups: GroupTemperature | None = None,
    risk_averse: float = 0.0,
) -> Ranking:
    """Ranks the candidates of one prompt by reward.

    Args:
        rewards: One reward per candidate; at least one.
        temperature: T of the confidences.
        tie_below: As for `verdict`, between the best and the runner-up.
        top_k: Number of candidates in `ranking`; all by default. `mean`, `std` and `p_best` are always over all.
        groups: Temperatures for chosen maxima, which take the place of `temperature`.
        risk_averse: k of the order by reward - k std, for rewards that carry their uncertainty.

    Raises:
        NonFiniteRewardError: A reward is NaN or infinite.
        NoUncertaintyError: `risk_averse` is not 0, and the rewards carry no uncertainty.
        ValueError: There is no candidate, `top_k` is less than 1, `risk_averse` is negative, or as for `verdict`.
    """
    if not rewards:
        raise ValueError("There is no candidate to rank.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: it must be at least 1.")
    _check_rewards(rewards)
    _check_temperature(temperature)
    keys = averse(rewards, risk_averse) if risk_averse else rewards
    order = sorted(range(len(rewards)), key=lambda index: -keys[index])  # stable: equal keys keep their order
    best = rewards[order[0]]
    of_pick, of_best = (groups.of_pick(len(rewards)), groups.of_best(len(rewards))) if groups else (temperature,) * 2
    logits = [(reward - best) / widened(of_best, margin_std(reward, best)) for reward in rewards]
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    total = math.fsum(weights)
    mean = math.fsum(rewards) / len(rewards)
    first_two = compare(best, rewards[order[1]], of_pick, tie_below) if len(order) > 1 else None
    return Ranking(
        best=order[0],
        margin=first_two.margin if first_two else None,
        confidence=first_two.confidence if first_two else None,
        tie=first_two is not None and first_two.verdict == "tie",
        ranking=tuple(
            RankedCandidate(index, place, rewards[index], weights[index] / total, familiarity_of(rewards[index]))
            for place, index in enumerate(order[:top_k], start=1)
        ),
        mean=mean,
        std=math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)),
        margin_std=first_two.margin_std if first_two else None,
        confidence_from="groups" if groups else "pairs",
    )


def averse(rewards: Sequence[float], factor: float) -> list[float]:
    """Returns reward - factor * std of each candidate.

    Raises:
        NoUncertaintyError: A reward carries no uncertainty.
        ValueError: The factor is not positive.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"risk_averse = {factor}: it must not be negative.")
    keys = [reward - factor * reward.std for reward in rewards if isinstance(reward, UncertainReward)]
    if len(keys) < len(rewards):
        raise NoUncertaintyError
    return keys


def _check_rewards(rewards: Sequence[float]) -> None:
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise NonFiniteRewardError(f"Reward {index} is {reward}; only finite rewards can be compared.")


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature = {temperature}: it must be a positive number.")
