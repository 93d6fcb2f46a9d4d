"""The report's figures: numbers in, SVG text out. No window, no global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from marginrm.calibration import Floats
from marginrm.manifest import ReliabilityBin
from marginrm_training.evaluation.best_of_n import BestOfNPoint
from marginrm_training.evaluation.bootstrap import Estimate

_ONE, _TWO, _GREY = "#1f6f5c", "#c4622d", "#8a8f8c"
_CURVES = (
    ("loss", ("loss", "bt_nll", "eval_bt_nll"), "nats"),
    ("accuracy and fire rate", ("accuracy", "eval_accuracy", "fire_rate"), "share"),
    ("reward difference d", ("d_mean", "d_std", "mu_B", "target_margin"), "reward"),
    ("gradient norm", ("grad_norm",), ""),
)


def learning_curves(history: Sequence[Mapping[str, float]]) -> str:
    """Draws what the step log holds, one panel for each unit."""
    shown = [curve for curve in _CURVES if any(name in entry for name in curve[1] for entry in history)]
    figure = Figure(figsize=(9, 2.4 * ((len(shown) + 1) // 2)))
    for number, (title, names, unit) in enumerate(shown, 1):
        axis = figure.add_subplot((len(shown) + 1) // 2, 2, number)
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                marker = "." if name.startswith("eval_") else ""  # they are few
                axis.plot(*zip(*points, strict=True), marker=marker, label=name, linewidth=1.3)
        _plain(axis, title, "step", unit)
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=7)
    return _svg(figure)


def margin_distribution(margins: Mapping[str, Floats]) -> str:
    """Draws histograms of margins over each other, by name; of a model before and after training it should move right."""
    figure = Figure(figsize=(6, 2.8))
    axis = figure.add_subplot()
    low, high = np.quantile(np.concatenate(list(margins.values())), [0.002, 0.998])
    edges = np.linspace(low, max(high, low + 1e-6), 50).tolist()
    few = len(margins) <= 2
    colours = [_GREY, _ONE][-len(margins) :] if few else [f"C{number}" for number in range(len(margins))]
    for (name, values), colour in zip(margins.items(), colours, strict=True):
        style = {"alpha": 0.65} if few else {"histtype": "step", "linewidth": 1.3}
        axis.hist(np.clip(values, low, high), edges, density=True, color=colour, label=name, **style)
    axis.axvline(0, color="black", linewidth=0.8)
    _plain(axis, "margins: reward(chosen) - reward(rejected)", "margin (outermost bars hold the tails)", "density")
    if len(margins) > 1:
        axis.legend(frameon=False, fontsize=8)
    return _svg(figure)


def estimates(panels: Mapping[str, Mapping[str, Estimate | None]], *, zero: Sequence[str] = ()) -> str:
    """Draws values with their intervals, a line for each name, in panels side by side.

    Args:
        panels: By title: by name, which all panels share, a value and its interval, or None for nothing to draw.
        zero: Titles of the panels in which 0 is where nothing differs.
    """
    names = list(next(iter(panels.values())))
    figure = Figure(figsize=(9, 0.9 + 0.24 * max(1, len(names))))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        for row, name in enumerate(names):
            found = values[name]
            if found:
                value, low, high = found
                axis.plot([low, high], [row, row], color=_ONE, linewidth=1.3)
                axis.plot([value], [row], "o", color=_ONE, markersize=4)
        if title in zero:
            axis.axvline(0, color="black", linewidth=0.8)
        _plain(axis, title, "", "")
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(max(1, len(names)) - 0.5, -0.5)
        axis.grid(axis="x", color=_GREY, alpha=0.3)
    return _svg(figure)


def reliability(before: Sequence[ReliabilityBin], after: Sequence[ReliabilityBin]) -> str:
    """Draws accuracy against confidence, before and after calibration; on the diagonal a confidence is what it says."""
    figure = Figure(figsize=(3.6, 3.4))
    axis = figure.add_subplot()
    axis.plot([0.5, 1], [0.5, 1], color=_GREY, linewidth=1, linestyle="--")
    for bins, colour, label in ((before, _TWO, "T = 1"), (after, _ONE, "calibrated")):
        points = [(one.confidence, one.accuracy, one.count) for one in bins if one.confidence is not None]
        most = max((count for *_, count in points), default=1)
        axis.scatter(
            [point[0] for point in points],
            [point[1] or 0.0 for point in points],
            s=[15 + 100 * point[2] / most for point in points],
            color=colour,
            alpha=0.7,
            label=label,
        )
    _plain(axis, "reliability (size: pairs in the bin)", "confidence", "accuracy")
    axis.legend(frameon=False, fontsize=8)
    return _svg(figure)


def strength_bars(metrics: Mapping[str, float]) -> str | None:
    """Draws the accuracy in each range of preference strength; None where the data has no strengths."""
    prefix = "accuracy_strength_"
    found = {
        name.removeprefix(prefix).replace("_", " to "): v for name, v in metrics.items() if name.startswith(prefix)
    }
    if not found:
        return None
    figure = Figure(figsize=(5, 2.8))
    axis = figure.add_subplot()
    axis.bar(list(found), list(found.values()), color=_ONE, width=0.7)
    axis.axhline(0.5, color="black", linewidth=0.8)
    axis.set_ylim(0, 1)
    _plain(axis, "accuracy by preference strength", "strength", "accuracy")
    return _svg(figure)


def best_of_n_curve(curves: Mapping[str, Sequence[BestOfNPoint]]) -> str:
    """Draws the mean quality of each model's pick against N, beside random, the longest text and the best.

    Args:
        curves: Points by the model's name, all on the same prompts.
    """
    figure = Figure(figsize=(5.5, 3.2))
    axis = figure.add_subplot()
    points = next(iter(curves.values()))
    ns = [point.n for point in points]
    for name, style in (("oracle", "--"), ("longest", "-."), ("random", ":")):
        axis.plot(ns, [getattr(point, name) for point in points], style, color=_GREY, label=name)
    for (name, own), colour in zip(curves.items(), (_ONE, _TWO), strict=False):
        axis.plot(ns, [point.model for point in own], color=colour, label=name, linewidth=1.6)
        axis.fill_between(
            ns, [point.model_low for point in own], [point.model_high for point in own], color=colour, alpha=0.15
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(ns, [str(n) for n in ns])
    _plain(axis, "Best-of-N", "N", "quality of the pick")
    above = axis.secondary_xaxis("top")
    above.set_xticks(ns, [f"{point.kl:.2f}" for point in points], fontsize=6)
    above.set_xlabel("most KL from the base policy: log N - (N - 1) / N, nats", fontsize=6)
    axis.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _plain(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _svg(figure: Figure) -> str:
    """Returns a figure as an SVG element whose ids and bytes are the same every time."""
    figure.tight_layout()
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "marginrm"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
