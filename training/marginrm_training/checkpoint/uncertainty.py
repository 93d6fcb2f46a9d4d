"""Pairs -> the posterior of a checkpoint's head, and a temperature beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from marginrm.calibration import Floats, calibrate, calibrate_uncertain, sigmoid
from marginrm.head_posterior import FILE_NAME, HeadPosterior, Laplace, laplace
from marginrm.manifest import Calibration, Uncertainty
from marginrm.progress import progress_bar
from marginrm.reward_model import RewardModel
from marginrm_training.data.splits import EncodedPair

MOST_PAIRS = 2_000  # of the training pairs, whose curvature stands for all


@dataclass(frozen=True, slots=True)
class FittedUncertainty:
    """A posterior of the head, and the calibration beside it.

    Attributes:
        posterior: The posterior, with the features of the calibration texts.
        calibration: T beside the uncertainty, and the quality of the confidences.
        laplace: The posterior's covariance and prior.
        pairs: Number of pairs that it was computed from.
        margin_std: Root mean square of the standard deviations of the calibration margins.
        alone: The calibration without the uncertainty.
    """

    posterior: HeadPosterior
    calibration: Calibration
    laplace: Laplace
    pairs: int
    margin_std: float
    alone: Calibration

    def save(self, folder: Path) -> Uncertainty:
        """Writes the posterior beside the weights, and returns its part of the manifest."""
        return Uncertainty(
            file=FILE_NAME,
            sha256=self.posterior.save(folder),
            pairs=self.pairs,
            prior_precision=self.laplace.prior_precision,
            margin_std=self.margin_std,
            temperature_alone=self.alone.temperature,
            ece_alone=self.alone.ece_after,
            nll_alone=self.alone.nll_after,
        )


def fit_uncertainty(
    model: RewardModel, held_out: Sequence[EncodedPair], training: Sequence[EncodedPair] = ()
) -> FittedUncertainty:
    """Computes the posterior of a model's head, and fits a temperature beside it.

    Args:
        model: The checkpoint.
        held_out: Pairs to fit the temperature on; their texts are what familiarity refers to.
        training: The pairs that the head was trained on, of which 2,000 at most are scored. Without them the posterior
            comes from the held-out pairs, and the uncertainty of each is that of the posterior without it.

    Raises:
        HeadError: The head does not end in a linear layer that gives the reward, or the model reads steps.
    """
    margins, features = _features(model, held_out)
    differences = features[:, 0] - features[:, 1]
    layer = model.module.last_linear
    assert layer is not None  # its inputs were read
    weights = layer.weight.detach().double().cpu().numpy()[0]
    alone = calibrate(margins)
    t = alone.temperature
    if training:
        used = training[:MOST_PAIRS]
        seen, inputs = _features(model, used)
        found = laplace(inputs[:, 0] - inputs[:, 1], seen, t, weights, counts_for=len(training) / len(used))
        variances = found.variances(differences)
    else:
        found = laplace(differences, margins, t, weights)
        variances = without_itself(found.variances(differences), margins, t)
    stds = np.sqrt(variances)
    return FittedUncertainty(
        posterior=HeadPosterior.of(found, features.reshape(-1, features.shape[-1])),
        calibration=calibrate_uncertain(margins, stds),
        laplace=found,
        pairs=len(training) or len(held_out),
        margin_std=float(np.sqrt(np.mean(variances))),
        alone=alone,
    )


def without_itself(variances: Floats, margins: Floats, temperature: float) -> Floats:
    """Returns the variance of each margin under the posterior without its own pair (Sherman and Morrison 1950).

    Without v x x^T, x^T (P - v x x^T)^-1 x = s / (1 - v s), where s = x^T P^-1 x and v = p (1 - p) / T^2.
    """
    p = sigmoid(margins / temperature)
    found: Floats = variances / (1.0 - p * (1 - p) / temperature**2 * variances)
    return found


def _features(model: RewardModel, pairs: Sequence[EncodedPair]) -> tuple[Floats, Floats]:
    """Returns the margins of pairs, [pairs], and the features of their responses, [pairs, 2, size]."""
    with progress_bar("reading features", 2 * len(pairs), "response") as bar:
        rewards, features = model.score_features([[pair.chosen, pair.rejected] for pair in pairs], bar.update)
    table = np.array(rewards, dtype=np.float64)
    return table[:, 0] - table[:, 1], np.stack(features)
