"""Metrics of a reward model on held-out preference pairs; target margins are not used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from marginrm.calibration import (
    Floats,
    area_under_risk_coverage,
    calibrate,
    calibrate_uncertain,
    correctness,
    narrowed,
)
from marginrm.confidence.uncertain_reward import familiarity_of, margin_std
from marginrm.progress import progress_bar
from marginrm.reward_model import RewardModel
from marginrm_training.data.mixture import SOURCE_NAME
from marginrm_training.data.splits import EncodedPair
from marginrm_training.evaluation.style import by_style

_STRENGTHS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class PairRewards:
    """Rewards of a split's pairs, each [pairs], in order.

    Attributes:
        chosen: Of the preferred responses.
        rejected: Of the others.
        std: Standard deviations of the margins; None for a model without.
        familiarity: The lower one of the two responses; None for a model without.
    """

    chosen: Floats
    rejected: Floats
    std: Floats | None = None
    familiarity: Floats | None = None

    @property
    def d(self) -> Floats:
        """Margins reward(chosen) - reward(rejected), [pairs]."""
        return self.chosen - self.rejected

    def sure(self, temperature: float) -> Floats:
        """Returns margins with which sigmoid(margin / T) integrates over their uncertainty, if they have one, [pairs]."""
        return self.d if self.std is None else narrowed(self.d, self.std, temperature)


def score_pairs(model: RewardModel, pairs: Sequence[EncodedPair], *, progress: bool = False) -> PairRewards:
    """Scores pairs with the same call that serving uses."""
    with progress_bar("scoring", 2 * len(pairs), "response", disable=not progress) as bar:
        rewards = model.score_encoded([[pair.chosen, pair.rejected] for pair in pairs], progress=bar.update)
    table = np.array(rewards, dtype=np.float64).reshape(-1, 2)
    if model.readout is None:
        return PairRewards(table[:, 0], table[:, 1])
    stds = np.array([margin_std(first, second) for first, second in rewards], dtype=np.float64)
    familiar = np.array([[familiarity_of(one) for one in pair] for pair in rewards], dtype=np.float64).reshape(-1, 2)
    return PairRewards(table[:, 0], table[:, 1], stds, familiar.min(axis=1))


def evaluate(
    rewards: PairRewards, pairs: Sequence[EncodedPair], temperature: float, alone: float | None = None
) -> dict[str, float]:
    """Measures a model on scored pairs.

    Args:
        rewards: The model's rewards.
        pairs: The pairs, for strengths and lengths.
        temperature: T of the confidence; ECE and Brier are given with T = 1 and with this one.
        alone: T without the uncertainty of margins; with it, figures without the uncertainty stand beside the others.

    Returns:
        Metrics by name; shares and probabilities lie in [0, 1], `*_nll` are in nats.
    """
    d, sure = rewards.d, rewards.sure(temperature)
    calibration = (
        calibrate(d, temperature=temperature)
        if rewards.std is None
        else calibrate_uncertain(d, rewards.std, temperature=temperature)
    )
    metrics = {
        "pairs": float(len(d)),
        "accuracy": float(correctness(d).mean()),
        "accuracy_strict": float((d > 0).mean()),
        "ties": float((d == 0).mean()),
        "bt_nll": float(np.logaddexp(0, -d).mean()),
        "nll": calibration.nll_after,
        "ece_before": calibration.ece_before,
        "ece": calibration.ece_after,
        "brier_before": calibration.brier_before,
        "brier": calibration.brier_after,
        "aurc": area_under_risk_coverage(sure),
        "margin_mean": float(d.mean()),
        "margin_std": float(d.std()),
        "margin_skew": skew(d),
        "reward_mean": float(np.concatenate([rewards.chosen, rewards.rejected]).mean()),
        "reward_std": float(np.concatenate([rewards.chosen, rewards.rejected]).std()),
    }
    metrics |= _uncertainty(rewards, alone)
    metrics |= length_diagnostics(d, pairs) | by_style(sure, pairs, temperature) | by_strength(d, pairs)
    return metrics | by_source(sure, pairs, temperature)


def _uncertainty(rewards: PairRewards, alone: float | None) -> dict[str, float]:
    """Returns the size of the uncertainty, the familiarity of the texts, and figures of the temperature alone."""
    if rewards.std is None or rewards.familiarity is None:
        return {}
    found = {
        "uncertainty": float(np.sqrt(np.mean(rewards.std**2))),
        "familiarity_median": float(np.median(rewards.familiarity)),
    }
    if alone is None:
        return found
    return found | {
        "ece_temperature_alone": calibrate(rewards.d, temperature=alone).ece_after,
        "nll_temperature_alone": calibrate(rewards.d, temperature=alone).nll_after,
        "aurc_temperature_alone": area_under_risk_coverage(rewards.d),
    }


def length_diagnostics(d: Floats, pairs: Sequence[EncodedPair]) -> dict[str, float]:
    """Measures the part of length in the margins: their correlation, and the accuracy of picking the longer text."""
    longer = np.array([len(pair.pair.chosen) - len(pair.pair.rejected) for pair in pairs], dtype=np.float64)
    correct = correctness(d)
    found = {"pick_longest_accuracy": float(correctness(longer).mean())}
    if longer.std() > 0 and d.std() > 0:
        found["length_correlation"] = float(np.corrcoef(d, longer)[0, 1])
    if (longer > 0).any():
        found["accuracy_longer_chosen"] = float(correct[longer > 0].mean())
    if (longer < 0).any():
        found["accuracy_shorter_chosen"] = float(correct[longer < 0].mean())
    return found


def by_strength(d: Floats, pairs: Sequence[EncodedPair]) -> dict[str, float]:
    """Returns accuracy and number of pairs for each range of preference strength, if every pair has a strength."""
    if any(pair.pair.strength is None for pair in pairs):
        return {}
    strength = np.array([pair.pair.strength for pair in pairs], dtype=np.float64)
    correct = correctness(d)
    found = {}
    for low, high in pairwise(_STRENGTHS):
        inside = (strength >= low) & ((strength < high) | (high == _STRENGTHS[-1]))
        if inside.any():
            found[f"accuracy_strength_{low:g}_{high:g}"] = float(correct[inside].mean())
            found[f"pairs_strength_{low:g}_{high:g}"] = float(inside.sum())
    return found


def by_source(d: Floats, pairs: Sequence[EncodedPair], temperature: float) -> dict[str, float]:
    """Returns accuracy, ECE and number of pairs for each source, if the run has several."""
    names = [pair.pair.extra.get(SOURCE_NAME) for pair in pairs]
    found = {}
    for name in sorted({name for name in names if name is not None}):
        own = d[np.array([one == name for one in names])]
        found[f"accuracy_source_{name}"] = float(correctness(own).mean())
        found[f"ece_source_{name}"] = calibrate(own.tolist(), temperature=temperature).ece_after
        found[f"pairs_source_{name}"] = float(len(own))
    return found


def true_margin_correlation(d: Floats, pairs: Sequence[EncodedPair]) -> float | None:
    """Returns the rank correlation of margins with the rows' `true_margin`; None unless every row has one."""
    truth = [pair.pair.extra.get("true_margin") for pair in pairs]
    if not truth or None in truth:
        return None
    return spearman(d.tolist(), [float(value) for value in truth if value is not None])


def skew(values: Floats) -> float:
    """Returns the third standardised moment, 0 for a constant."""
    deviation = values.std()
    return float((((values - values.mean()) / deviation) ** 3).mean()) if deviation > 0 else 0.0


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns Spearman's rank correlation, with ties at their mean rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Sequence[float]) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Floats = ends - (counts - 1) / 2
    return means[inverse]
