"""The figures of the reports, as SVG text, drawn by the functions that draw the server's pages."""

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
    """Draws the learning curve, one figure for each unit."""
    figures = []
    for title, names, unit in _CURVES:
        curves = {name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in names}
        shown = {name: points for name, points in curves.items() if points}
        if shown:
            figures.append(drawings.lines(title, unit, shown))
    return figures


def margin_distribution(margins: Mapping[str, Floats]) -> str:
    """Draws histograms of margins over each other, by name; training should move a model's histogram to the right."""
    low, high = np.quantile(np.concatenate(list(margins.values())), [0.002, 0.998])
    edges = np.linspace(low, max(high, low + 1e-6), _BINS + 1)
    counts = {name: np.histogram(np.clip(values, low, high), edges)[0].tolist() for name, values in margins.items()}
    return drawings.margin_histogram(counts, edges.tolist())


def estimates(
    panels: Mapping[str, Mapping[str, Estimate | None]], *, zero: Sequence[str] = (), standalone: bool = False
) -> str:
    """Draws values with their intervals, a line for each name, in panels side by side.

    Args:
        panels: By title, a value with its interval for each name, or None to draw nothing; all panels share the names.
        zero: Titles of the panels that show differences, with a line at 0.
        standalone: Whether the figure becomes a file of its own.
    """
    return drawings.estimates(panels, zero=zero, standalone=standalone)


def reliability(before: Sequence[ReliabilityBin], after: Sequence[ReliabilityBin]) -> str:
    """Draws accuracy against confidence, before and after calibration; a calibrated model lies on the diagonal."""
    return drawings.reliability({"T = 1": before, "calibrated": after})


def strength_bars(metrics: Mapping[str, float]) -> str | None:
    """Draws the accuracy in each range of preference strength; returns None if the metrics have no strengths."""
    return drawings.strength_bars(metrics)


def style_bars(metrics: Mapping[str, float]) -> str | None:
    """Draws accuracy and mean confidence by style agreement; returns None if style never decides."""
    return drawings.style_bars(metrics)


def best_of_n_curve(curves: Mapping[str, Sequence[BestOfNPoint]]) -> str:
    """Draws the mean quality of each model's pick against N, beside random, the longest text and the best.

    Args:
        curves: Points by the model's name, all on the same prompts.
    """
    return drawings.best_of_n(curves)
