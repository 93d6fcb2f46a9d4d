"""Margins of models that never saw a pair -> the probability that its label is wrong. Pure numpy.

The labels are modelled as a Bradley-Terry judge's, of which a share is exchanged at random (Natarajan et al. 2013):
P(label) = (1 - e) sigmoid(d / T) + e sigmoid(-d / T). e and T are fitted together by maximum likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from marginrm.calibration import T_MAX, T_MIN, Floats, fit_temperature, sigmoid
from marginrm.errors import CalibrationError
from marginrm_training.data.splits import EncodedPair

_ROUNDS, _POINTS = 6, 13  # log T: so many grids, each between the neighbours of the best point of the one before


@dataclass(frozen=True, slots=True)
class LabelNoise:
    """A fitted model of the labels.

    Attributes:
        temperature: T of the judge.
        share: e, the share of labels that are exchanged, at most 1/2.
    """

    temperature: float
    share: float

    def wrong(self, d: Floats) -> Floats:
        """Returns the probability that a pair's label is exchanged, given its margin, [pairs]."""
        agrees = sigmoid(d / self.temperature)
        exchanged = self.share * (1 - agrees)
        found: Floats = exchanged / ((1 - self.share) * agrees + exchanged + 1e-300)
        return found


@dataclass(frozen=True, slots=True)
class Suspect:
    """A pair whose label is probably wrong.

    Attributes:
        pair: The pair.
        margin: reward(chosen) - reward(rejected) by the model that never saw it, in units of that model's temperature.
        confidence: Probability that the rejected response is better, sigmoid(-margin / T).
        wrong: Probability that the label is exchanged.
    """

    pair: EncodedPair
    margin: float
    confidence: float
    wrong: float


def fit_label_noise(d: Floats) -> LabelNoise:
    """Fits temperature and share of exchanged labels to margins, [pairs], by maximum likelihood.

    Raises:
        CalibrationError: There are no margins.
    """
    if d.size == 0:
        raise CalibrationError("There are no margins to estimate the share of wrong labels from.")
    best, low, high = 0.0, math.log(T_MIN), math.log(T_MAX)
    for _ in range(_ROUNDS):
        tried = np.linspace(low, high, _POINTS)
        best = float(tried[int(np.argmax([_likelihood(d, log_t)[0] for log_t in tried]))])
        step = (high - low) / (_POINTS - 1)
        low, high = max(best - step, math.log(T_MIN)), min(best + step, math.log(T_MAX))
    return LabelNoise(math.exp(best), _likelihood(d, best)[1])


def _likelihood(d: Floats, log_t: float) -> tuple[float, float]:
    """Returns the log likelihood at T with the best share of exchanged labels, and that share.

    With s = sigmoid(d / T) it is the sum of log(s + e (1 - 2 s)), concave in e: bisection on the slope finds e.
    """
    s = sigmoid(d * math.exp(-log_t))
    gap = 1 - 2 * s
    low, high = 0.0, 0.5
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(gap / (s + middle * gap)) > 0 else (low, middle)
    share = (low + high) / 2
    return float(np.sum(np.log(s + share * gap + 1e-300))), share


def in_units(margins: Sequence[Floats]) -> list[Floats]:
    """Returns each fold's margins divided by the fold's temperature: models of different folds have different scales."""
    return [fold / fit_temperature(fold) for fold in margins]


def suspects(pairs: Sequence[EncodedPair], d: Floats, noise: LabelNoise, above: float) -> list[Suspect]:
    """Returns the pairs whose label is wrong with probability `above` or more, the most probable first.

    Args:
        pairs: The pairs.
        d: Their margins, [pairs].
        noise: The fitted model of the labels.
        above: Smallest probability.
    """
    wrong, confidence = noise.wrong(d), sigmoid(-d / noise.temperature)
    order = [int(index) for index in np.argsort(d, kind="stable") if wrong[index] >= above]
    return [Suspect(pairs[i], float(d[i]), float(confidence[i]), float(wrong[i])) for i in order]
