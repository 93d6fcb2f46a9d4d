"""Arithmetic on measurements: rates, medians, and ratios within a round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and its range.

    Attributes:
        median: The median.
        low: The smallest value.
        high: The largest value.
        count: The number of values.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Returns the spread of some values, or None if there are no values."""
        return cls(median(values), min(values), max(values), len(values)) if values else None

    def text(self, form: str = ".3g", unit: str = "") -> str:
        """Returns `median (low to high)`.

        Args:
            form: The format of each number.
            unit: The unit, written after the median.
        """
        return f"{self.median:{form}}{unit} ({self.low:{form}} to {self.high:{form}})"


def median_or_none(values: Iterable[float]) -> float | None:
    """Returns the median, or None if there are no values."""
    found = list(values)
    return median(found) if found else None


def reward_rate(seconds: float, tokens: int, sample_tokens: int, sample_rewards: int) -> float:
    """Returns rewards per second on a sample, from a measurement of all of it or of a subset.

    A subset may hold shorter or longer responses than the sample. Its rate is therefore taken in requested tokens (every
    sequence with its prompt, without padding) and divided by the sample's mean tokens per reward. For the whole sample
    this equals rewards / seconds.
    """
    return tokens / seconds / (sample_tokens / sample_rewards)


def ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Returns ours / theirs for each round that both have, in the order of the rounds."""
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]


def gemm_share(linear_parameters: int, computed: int, seconds: float, gemm_rate: float) -> float:
    """Returns the rate of the linear layers as a share of the machine's rate of a large matrix product.

    Args:
        linear_parameters: Weights that multiply every token, at 2 FLOP each.
        computed: Tokens computed.
        seconds: Wall time, attention and tokenisation included.
        gemm_rate: Measured rate of a large matrix product, FLOP/s.
    """
    return 2 * linear_parameters * computed / seconds / gemm_rate


def largest_difference(
    rewards: Mapping[tuple[int, ...], float], reference: Mapping[tuple[int, ...], float]
) -> float | None:
    """Returns the largest difference between rewards of the same token ids, or None if they have no ids in common."""
    return max((abs(rewards[ids] - reference[ids]) for ids in rewards.keys() & reference.keys()), default=None)
