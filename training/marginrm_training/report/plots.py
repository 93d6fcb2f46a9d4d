"""The reports' figures: what was measured in, SVG text out, drawn as the server's pages draw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from marginrm.calibration import Floats
from marginrm.figures import drawings
from marginrm.manifest import ReliabilityBin
from marginrm_training.evaluation.best_of_n import BestOfNPoint
from marginrm_training.evaluation.bootstrap import Estimate

_BINS = 49
_CURVES = (
    ("loss", ("loss", "bt_nll", "eval_bt_nll"), "nats"),
    ("accuracy and fire rate", ("accuracy", "eval_accuracy", "fire_rate"), "share"),
    ("reward difference d", ("d_mean", "d_std", "mu_B", "target_margin"), "reward"),
    ("gradient norm", ("grad_norm",), "norm"),
)


def learning_curves(history: Sequence[Mapping[str, float]]) -> list[str]:
    """Draws what the step log holds, one figure for each unit."""
    figures = []
    for title, names, unit in _CURVES:
        curves = {name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in names}
        shown = {name: points for name, points in curves.items() if points}
        if shown:
            figures.append(drawings.lines(title, unit, shown))
    return figures


def margin_distribution(margins: Mapping[str, Floats]) -> str:
    """Draws histograms of margins over each other, by name; of a model before and after training it should move right."""
    low, high = np.quantile(np.concatenate(list(margins.values())), [0.002, 0.998])
    edges = np.linspace(low, max(high, low + 1e-6), _BINS + 1)
    counts = {name: np.histogram(np.clip(values, low, high), edges)[0].tolist() for name, values in margins.items()}
    return drawings.margin_histogram(counts, edges.tolist())


def estimates(
    panels: Mapping[str, Mapping[str, Estimate | None]], *, zero: Sequence[str] = (), standalone: bool = False
) -> str:
    """Draws values with their intervals, a line for each name, in panels side by side.

    Args:
        panels: By title: by name, which all panels share, a value and its interval, or None for nothing to draw.
        zero: Titles of the panels in which 0 is where nothing differs.
        standalone: Whether the figure becomes a file of its own.
    """
    return drawings.estimates(panels, zero=zero, standalone=standalone)


def reliability(before: Sequence[ReliabilityBin], after: Sequence[ReliabilityBin]) -> str:
    """Draws accuracy against confidence, before and after calibration; on the diagonal a confidence is what it says."""
    return drawings.reliability({"T = 1": before, "calibrated": after})


def strength_bars(metrics: Mapping[str, float]) -> str | None:
    """Draws the accuracy in each range of preference strength; None where the data has no strengths."""
    return drawings.strength_bars(metrics)


def best_of_n_curve(curves: Mapping[str, Sequence[BestOfNPoint]]) -> str:
    """Draws the mean quality of each model's pick against N, beside random, the longest text and the best.

    Args:
        curves: Points by the model's name, all on the same prompts.
    """
    return drawings.best_of_n(curves)
