"""Rewards that carry what is needed to say how sure the model can be of them.

The weights of a head's last linear layer are known only as well as the calibration pairs determine them. Laplace's
method approximates their posterior by a Gaussian, and a reward carries its deviations under some draws from it. So the
standard deviation of a margin follows from its two rewards, wherever and whenever each of them was computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

_PROBIT = math.pi / 8  # sigmoid(x) is close to the normal distribution's Phi(x sqrt(pi / 8))


class UncertainReward(float):
    """A reward with its uncertainty.

    Attributes:
        deviations: Of the reward under draws of the head's weights, each divided by the root of their number, [draws].
            Their Euclidean norm is the standard deviation of the reward, their distance that of a margin.
        familiarity: Share of the calibration texts that are less like the others than this one, in [0, 1].
    """

    __slots__ = ("deviations", "familiarity")
    deviations: Sequence[float]
    familiarity: float

    def __new__(cls, reward: float, deviations: Sequence[float], familiarity: float) -> Self:
        """Makes a reward with its uncertainty."""
        made = super().__new__(cls, reward)
        made.deviations = deviations
        made.familiarity = familiarity
        return made

    def __getnewargs__(self) -> tuple[float, Sequence[float], float]:  # type: ignore[override]
        """Returns what a copy is made of."""
        return float(self), self.deviations, self.familiarity

    @property
    def std(self) -> float:
        """Standard deviation of the reward, relative to that of the mean calibration text."""
        return math.hypot(*self.deviations)


def margin_std(first: float, second: float) -> float | None:
    """Returns the standard deviation of the difference of two rewards; None unless both carry their uncertainty."""
    if not (isinstance(first, UncertainReward) and isinstance(second, UncertainReward)):
        return None
    return math.dist(first.deviations, second.deviations)


def familiarity_of(reward: float) -> float | None:
    """Returns the familiarity of a reward's text; None for a model without."""
    return reward.familiarity if isinstance(reward, UncertainReward) else None


def widened(temperature: float, std: float | None) -> float:
    """Returns the temperature for a margin that is itself uncertain: sqrt(T^2 + pi / 8 std^2).

    The mean of sigmoid(x / T) over a normal x is about sigmoid(mean of x / that) (MacKay 1992, "The evidence framework
    applied to classification networks").
    """
    return temperature if std is None else math.sqrt(temperature**2 + _PROBIT * std**2)
