"""Style in measures: accuracy and confidence by style agreement, and a temperature fitted beside style."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from marginrm.calibration import Floats, calibrate, correctness, sigmoid
from marginrm.manifest import Calibration
from marginrm_training.data.splits import EncodedPair
from marginrm_training.method.style import fit_beside_style, style_agreement, style_differences

AGREEMENTS = {"for": 1, "against": -1, "neither": 0}


def differences_of(pairs: Sequence[EncodedPair]) -> Floats:
    """Returns style(chosen) - style(rejected) of pairs, [pairs, features]."""
    return style_differences((pair.pair.chosen, pair.pair.rejected) for pair in pairs)


def by_style(d: Floats, pairs: Sequence[EncodedPair], temperature: float) -> dict[str, float]:
    """Returns accuracy, mean confidence and number of pairs by style agreement, and the gap in accuracy.

    The groups: style speaks `for` the better response, `against` it, or for `neither`. `style_gap` is for - against.

    Args:
        d: Margins, [pairs].
        pairs: The pairs.
        temperature: T of the confidence sigmoid(|d| / T).
    """
    agreement, correct, sure = style_agreement(differences_of(pairs)), correctness(d), sigmoid(np.abs(d) / temperature)
    found = {}
    for name, sign in AGREEMENTS.items():
        inside = agreement == sign
        if inside.any():
            found[f"accuracy_style_{name}"] = float(correct[inside].mean())
            found[f"confidence_style_{name}"] = float(sure[inside].mean())
        found[f"pairs_style_{name}"] = float(inside.sum())
    if found["pairs_style_for"] and found["pairs_style_against"]:
        found["style_gap"] = found["accuracy_style_for"] - found["accuracy_style_against"]
    return found


def calibrate_beside_style(d: Floats, pairs: Sequence[EncodedPair]) -> Calibration:
    """Fits T with style in the logit, and measures the confidence that is served, sigmoid(d / T), as `calibrate` does.

    Style explains labels and is left out of the served confidence, which therefore is that of two responses of one style.

    Args:
        d: Margins, [pairs].
        pairs: The pairs.
    """
    fitted = fit_beside_style(d, differences_of(pairs))
    measured = calibrate(d, temperature=fitted.temperature)
    return measured.model_copy(update={"temperature_interval": fitted.interval, "style": fitted.weights})
