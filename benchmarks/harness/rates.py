"""Pure arithmetic on measurements: rates, medians, and ratios that are taken within a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the range that it comes from.

    Attributes:
        median: The middle value.
        low: The smallest.
        high: The largest.
        count: How many values.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Returns the spread of some values, or None of none."""
        return cls(median(values), min(values), max(values), len(values)) if values else None


def reward_rate(seconds: float, tokens: int, portion_tokens: int, portion_rewards: int) -> float:
    """Returns rewards per second on a portion, from a measurement of all or of a part of it.

    A part may hold shorter or longer responses than the whole, so its rate is taken in tokens (as asked: every sequence
    with its prompt, without padding) and divided by the portion's mean tokens per reward. For the whole portion this is
    its rewards divided by the seconds.
    """
    return tokens / seconds / (portion_tokens / portion_rewards)


def ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Returns ours / theirs for each round that both have, in the rounds' order."""
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]


def gemm_share(linear_parameters: int, computed: int, seconds: float, gemm_rate: float) -> float:
    """Returns the share of the machine's matrix product rate that the linear layers alone account for.

    Args:
        linear_parameters: Weights that multiply every token, at 2 FLOP each.
        computed: Tokens computed.
        seconds: Time for everything, attention and tokenisation included.
        gemm_rate: Measured rate of a large matrix product, FLOP/s.
    """
    return 2 * linear_parameters * computed / seconds / gemm_rate


def largest_difference(
    rewards: Mapping[tuple[int, ...], float], reference: Mapping[tuple[int, ...], float]
) -> float | None:
    """Returns by how much rewards of the same token ids differ at most, or None if there are none in common."""
    return max((abs(rewards[ids] - reference[ids]) for ids in rewards.keys() & reference.keys()), default=None)
