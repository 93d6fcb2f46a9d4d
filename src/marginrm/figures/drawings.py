"""The named figures: one function each, numbers in and an SVG element out, used alike by pages and reports."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from marginrm.figures.chart import Axis, Chart, Point, categories, linear, powers, row
from marginrm.intervals import wilson
from marginrm.manifest import ReliabilityBin, RiskCoveragePoint

Estimate = tuple[float, float, float]
STRENGTH_PREFIX = "accuracy_strength_"
STYLE_PREFIX = "accuracy_style_"
_STYLE_NAMES = {"for": "for the better one", "against": "against it", "neither": "neither"}


class BestOfNPoint(Protocol):
    """One point of a Best-of-N curve, as `marginrm_training.evaluation.best_of_n` measures it."""

    @property
    def n(self) -> int:
        """Number of candidates."""

    @property
    def kl(self) -> float:
        """Upper bound on the distance from the base policy, in nats."""

    @property
    def model(self) -> float:
        """Mean quality of the model's pick."""

    @property
    def model_low(self) -> float:
        """Lower end of its 95% interval."""

    @property
    def model_high(self) -> float:
        """Upper end of its 95% interval."""

    @property
    def longest(self) -> float:
        """Mean quality of the longest text."""

    @property
    def oracle(self) -> float:
        """Mean quality of the best candidate."""

    @property
    def random(self) -> float:
        """Mean quality of any candidate."""


def reliability(curves: Mapping[str, Sequence[ReliabilityBin]]) -> str:
    """Draws accuracy against confidence, for each set of bins; on the diagonal a confidence is what it says.

    Args:
        curves: Bins by name, two at most, the less important first.
    """
    chart = Chart(
        "Reliability (size: pairs in the bin)",
        linear("confidence", 0.5, 1, percent=True),
        linear("ranked right", 0, 1, percent=True),
    )
    chart.line([(0.5, 0.5), (1, 1)], "grey dashed")
    for (name, bins), css in zip(curves.items(), ("two", "one")[-len(curves) :], strict=True):
        most = max((one.count for one in bins), default=1)
        for one in bins:
            if one.confidence is None or one.accuracy is None:
                continue
            low, high = wilson(one.accuracy, one.count)
            title = f"{name}: confidence {one.confidence:.1%}, right {one.accuracy:.1%} [{low:.1%}, {high:.1%}] of {one.count:,}"
            chart.interval((one.confidence, low), (one.confidence, high), css)
            chart.dot(one.confidence, one.accuracy, css, radius=2.5 + 5 * math.sqrt(one.count / most), title=title)
        chart.legend(name, css)
    return chart.svg()


def risk_coverage(points: Sequence[RiskCoveragePoint]) -> str:
    """Draws the error rate among the most confident share of pairs against that share."""
    most = max([0.05, *(point.risk for point in points)])
    chart = Chart(
        "Risk against coverage",
        linear("share kept, surest first", 0, 1, percent=True),
        linear("ranked wrong", 0, most, percent=True),
    )
    chart.line([(point.coverage, point.risk) for point in points], "one")
    for point in points:
        title = f"the surest {point.coverage:.0%}: {point.risk:.1%} wrong, confidence {point.confidence:.1%} or more"
        chart.dot(point.coverage, point.risk, "one", radius=2.5, title=title)
    return chart.svg()


def margin_quantiles(quantiles: Mapping[str, float]) -> str:
    """Draws the density of margins between their quantiles, of which the checkpoint keeps no more.

    Args:
        quantiles: Probability, as text, to margin.
    """
    pairs = sorted((float(probability), margin) for probability, margin in quantiles.items())
    spans = [(low, high, after - before) for (before, low), (after, high) in itertools.pairwise(pairs) if high > low]
    return _histogram({"calibration pairs": [(low, high, share / (high - low)) for low, high, share in spans]}, "")


def margin_histogram(counts: Mapping[str, Sequence[int]], edges: Sequence[float]) -> str:
    """Draws histograms of margins over each other, by name.

    Args:
        counts: Margins in each bin, by name; the most important last.
        edges: Of the bins, one more than bins.
    """
    found = {
        name: [
            (low, high, count / max(1, sum(values)) / (high - low))
            for low, high, count in zip(edges, edges[1:], values, strict=False)
        ]
        for name, values in counts.items()
    }
    return _histogram(found, " (outermost bars hold the tails)")


def _histogram(found: Mapping[str, Sequence[tuple[float, float, float]]], note: str) -> str:
    spans = [span for bars in found.values() for span in bars]
    low, high = min((span[0] for span in spans), default=-1.0), max((span[1] for span in spans), default=1.0)
    top = max((span[2] for span in spans), default=1.0)
    chart = Chart(
        "Margins: reward(chosen) \u2212 reward(rejected)",
        linear(f"margin{note}", low, high),
        linear("density", 0, 1.05 * top),
    )
    few = len(found) <= 2
    classes = ["grey", "one"][-len(found) :] if few else [f"c{number}" for number in range(len(found))]
    for (name, bars), css in zip(found.items(), classes, strict=True):
        outline = [point for left, right, height in bars for point in ((left, height), (right, height))]
        if few and bars:
            chart.area([(bars[0][0], 0), (bars[-1][1], 0)], outline, css, label=name if len(found) > 1 else "")
        elif bars:
            chart.line([(bars[0][0], 0), *outline, (bars[-1][1], 0)], css, label=name)
    if low < 0 < high:
        chart.rule(x=0)
    return chart.svg()


def strength_bars(metrics: Mapping[str, float]) -> str | None:
    """Draws the accuracy in each range of preference strength; None where the data has no strengths."""
    found = {name.removeprefix(STRENGTH_PREFIX): v for name, v in metrics.items() if name.startswith(STRENGTH_PREFIX)}
    if not found:
        return None
    chart = Chart(
        "Accuracy by preference strength",
        categories("strength of the label", [span.replace("_", "\u2013") for span in found]),
        linear("accuracy", 0, 1, percent=True),
    )
    for place, (span, value) in enumerate(found.items()):
        count = metrics.get(f"pairs_strength_{span}")
        title = f"strength {span.replace('_', ' to ')}: {value:.1%}" + (f" of {count:,.0f} pairs" if count else "")
        chart.bar((place - 0.35, 0), (place + 0.35, value), "one", title=title)
        if count:
            low, high = wilson(value, int(count))
            chart.interval((place, low), (place, high), "rule")
    chart.rule(y=0.5)
    return chart.svg()


def style_bars(metrics: Mapping[str, float]) -> str | None:
    """Draws accuracy by style agreement, with the mean confidence as a dot; None where style never decides."""
    found = {name: metrics.get(f"{STYLE_PREFIX}{name}") for name in ("for", "against", "neither")}
    shown = {name: value for name, value in found.items() if value is not None}
    if not shown.keys() & {"for", "against"}:
        return None
    chart = Chart(
        "Accuracy by style (dot: mean confidence)",
        categories("length and markdown speak", [_STYLE_NAMES[name] for name in shown]),
        linear("accuracy", 0, 1, percent=True),
    )
    for place, (name, value) in enumerate(shown.items()):
        count, sure = metrics[f"pairs_style_{name}"], metrics[f"confidence_style_{name}"]
        title = f"{_STYLE_NAMES[name]}: {value:.1%} of {count:,.0f} pairs, mean confidence {sure:.1%}"
        chart.bar((place - 0.35, 0), (place + 0.35, value), "one", title=title)
        low, high = wilson(value, int(count))
        chart.interval((place, low), (place, high), "rule")
        chart.dot(place, sure, "two", radius=4, title=title)
    chart.rule(y=0.5)
    return chart.svg()


def best_of_n(curves: Mapping[str, Sequence[BestOfNPoint]]) -> str:
    """Draws the mean quality of each model's pick against N, beside random, the longest text and the best.

    Args:
        curves: Points by the model's name, all on the same prompts.
    """
    points = next(iter(curves.values()))
    values = [value for own in curves.values() for p in own for value in (p.oracle, p.random, p.longest, p.model_low)]
    margin = 0.05 * (max(values) - min(values)) or 0.05
    chart = Chart(
        "Best-of-N",
        powers("N candidates", [point.n for point in points]),
        linear("quality of the pick", min(values) - margin, max(values) + margin),
    )
    for name, dash in (("oracle", "dashed"), ("longest", "dashdot"), ("random", "dotted")):
        chart.line([(point.n, getattr(point, name)) for point in points], f"grey {dash}", label=name)
    for (name, own), css in zip(curves.items(), ("one", "two"), strict=False):
        chart.area([(p.n, p.model_low) for p in own], [(p.n, p.model_high) for p in own], f"band {css}")
        chart.line([(point.n, point.model) for point in own], css, label=name)
        for p in own:
            title = f"{name}, N = {p.n}: {p.model:.3f} [{p.model_low:.3f}, {p.model_high:.3f}], at most {p.kl:.2f} nats of KL"
            chart.dot(p.n, p.model, css, radius=2.5, title=title)
    return chart.svg()


def estimates(
    panels: Mapping[str, Mapping[str, Estimate | None]], *, zero: Sequence[str] = (), standalone: bool = False
) -> str:
    """Draws values with their intervals, a line for each name, in panels side by side.

    Args:
        panels: By title: by name, which all panels share, a value and its interval, or None for nothing to draw.
        zero: Titles of the panels in which 0 is where nothing differs.
        standalone: Whether the figure becomes a file of its own.
    """
    names = list(next(iter(panels.values())))
    charts: list[Chart] = []
    for title, values in panels.items():
        found = [value for value in values.values() if value]
        low = min([*(one[1] for one in found), *([0.0] if title in zero or not found else [])])
        high = max([*(one[2] for one in found), *([0.0] if title in zero or not found else [])])
        pad = 0.04 * (high - low)  # an interval that ends at the frame would look cut
        rows = categories("", ["" for _ in names] if charts else names)
        y = Axis("", rows.high, rows.low, rows.ticks)  # the first name at the top
        left = 30.0 if charts else 16 + 6.2 * max(map(len, names), default=1)  # the first panel has the names
        chart = Chart(
            title,
            linear("", low - pad, high + pad),
            y,
            left=left,
            width=left + 260,
            height=76 + 22 * max(1, len(names)),
        )
        for place, name in enumerate(names):
            estimate = values[name]
            if estimate:
                value, start, end = estimate
                chart.interval((start, place), (end, place), "one")
                chart.dot(value, place, "one", title=f"{name}: {value:.4f} [{start:.4f}, {end:.4f}]")
        if title in zero:
            chart.rule(x=0)
        charts.append(chart)
    return row(", ".join(panels), charts, standalone=standalone)


def lines(title: str, unit: str, curves: Mapping[str, Sequence[Point]]) -> str:
    """Draws lines over training steps, such as a loss; lines of evaluations, which are few points, with dots."""
    points = [point for curve in curves.values() for point in curve]
    low, high = min(y for _, y in points), max(y for _, y in points)
    pad = 0.04 * (high - low)
    chart = Chart(
        title,
        linear("step", min(x for x, _ in points), max(x for x, _ in points)),
        linear(unit, low - pad, high + pad),
        height=220,
    )
    for number, (name, curve) in enumerate(curves.items()):
        css = f"c{number}"
        chart.line(curve, css, label=name if len(curves) > 1 else "")
        for x, y in curve if name.startswith("eval_") else ():
            chart.dot(x, y, css, radius=2.5, title=f"{name}, step {x:.0f}: {y:.4f}")
    return chart.svg()


def drift(expected: Sequence[float], seen: Sequence[float], edges: Sequence[float]) -> str:
    """Draws the share of margins in each bin between the calibration's quantiles: expected, and served last.

    Args:
        expected: Share of each bin; they sum to 1.
        seen: Share of each bin among the served margins.
        edges: Margins between the bins, one fewer than bins.
    """
    texts = [f"{edge:.2g}" for edge in edges]
    names = [f"<{texts[0]}", *texts[1:], f">{texts[-1]}"] if texts else ["all"]
    chart = Chart(
        "Margins served, beside the calibration's",
        categories("margin up to", names),
        linear("share", 0, max([0.05, *expected, *seen]), percent=True),
    )
    for place, (before, now) in enumerate(zip(expected, seen, strict=True)):
        chart.bar((place - 0.38, 0), (place, before), "grey", title=f"expected {before:.1%}")
        chart.bar((place, 0), (place + 0.38, now), "one", title=f"served {now:.1%}")
    chart.legend("calibration", "grey")
    chart.legend("served last", "one")
    return chart.svg()
