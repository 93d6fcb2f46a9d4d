"""Confidences against a known truth: the best of N with noise of several kinds, and margins far from their pairs.

    python -m benchmarks.training.confidence

Everything is simulated, so that the right probabilities are known; it takes seconds and no model.
"""

from __future__ import annotations

import math

import numpy as np

from marginrm.calibration import Floats, calibrate_uncertain, fit_temperature, fit_uncertain_temperature
from marginrm.confidence.group_temperature import GroupTemperature
from marginrm.group_calibration import calibrate_groups, draw, measure, predict
from marginrm.head_posterior import laplace

PROMPTS, CANDIDATES = 100, 32
SIZE, PAIRS = 30, 120


def noise(kind: str, generator: np.random.Generator) -> Floats:
    """Returns errors of rewards, [prompts, candidates]."""
    shape = (PROMPTS, CANDIDATES)
    return generator.normal(size=shape) if kind == "normal" else generator.standard_t(3, shape)


def best_of_n(kind: str) -> None:
    """Prints the ECE of the pick on new prompts: with the temperature of random pairs, and with those of groups."""
    groups = []
    for seed in (0, 1):
        generator = np.random.default_rng(seed)
        gold = generator.normal(size=(PROMPTS, CANDIDATES))
        groups.append(((gold + noise(kind, generator)).tolist(), gold.tolist()))
    fitted_on = draw(*groups[0], draws=1)[2]
    margins = np.where(fitted_on.beats > 0.5, 1, -1) * fitted_on.lead[:, 1]
    temperature = fit_temperature(margins)
    fitted = calibrate_groups(*groups[0], temperature).temperature
    given = GroupTemperature(temperature=temperature, pick_slope=0.0, best_slope=0.0, largest=2)
    print(f"\n{kind} noise: T of pairs {temperature:.2f}; T(2) {fitted.temperature:.2f}, a {fitted.pick_slope:.2f}")
    for n, choices in draw(*groups[1], draws=1).items():
        found = measure(choices, predict(choices, given), predict(choices, fitted))
        print(f"N = {n:>2}: ECE {found.ece_before:.3f} -> {found.ece:.3f} (by chance {found.chance:.3f})")


def off_the_data() -> None:
    """Prints ECE and NLL of a logistic regression on few pairs, near them and far from them."""
    generator = np.random.default_rng(2)
    truth = generator.normal(size=SIZE) / math.sqrt(SIZE) * 2

    def labelled(count: int, scale: float) -> Floats:
        x = generator.normal(size=(count, SIZE)) * scale
        return np.where((generator.random(count) < 1 / (1 + np.exp(-x @ truth)))[:, None], x, -x)

    x, w = labelled(PAIRS, 1.0), np.zeros(SIZE)
    for _ in range(50):  # the maximum of the posterior with prior precision 1
        p = 1 / (1 + np.exp(-x @ w))
        w += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.eye(SIZE), x.T @ (1 - p) - w)
    posterior, held_out = laplace(x, x @ w, 1.0, w), labelled(4000, 1.0)
    alone = fit_temperature(held_out @ w)
    both = fit_uncertain_temperature(held_out @ w, np.sqrt(posterior.variances(held_out)))
    print(f"\nhead on {PAIRS} pairs, {SIZE} features: T alone {alone:.2f}, beside the uncertainty {both:.2f}")
    for scale in (1.0, 2.0, 4.0):
        new = labelled(4000, scale)
        plain = calibrate_uncertain(new @ w, np.zeros(4000), temperature=alone)
        found = calibrate_uncertain(new @ w, np.sqrt(posterior.variances(new)), temperature=both)
        print(
            f"features {scale:.0f} times as large: ECE {plain.ece_after:.3f} -> {found.ece_after:.3f}, "
            f"NLL {plain.nll_after:.3f} -> {found.nll_after:.3f}"
        )


if __name__ == "__main__":
    for kind in ("normal", "heavy-tailed"):
        best_of_n(kind)
    off_the_data()
