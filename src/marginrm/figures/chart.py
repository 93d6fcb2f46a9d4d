"""Axes and marks of one figure -> SVG text, with class names in place of colours.

Coordinates are rounded to a tenth of a pixel, so that the same numbers give the same bytes. A mark's exact values are
in its `<title>`, which a browser shows on hover and a screen reader can read.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
_TOP, _RIGHT, _BOTTOM = 30.0, 20.0, 42.0  # pixels around the plot
_LEGEND_LINE = 16.0


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its range, and the values that are labelled.

    Attributes:
        label: Text beside the axis; empty for none.
        low: The value at the left or the bottom.
        high: The value at the right or the top.
        ticks: Values and their texts.
        log: Whether positions grow with the logarithm of the value.
    """

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def share(self, value: float) -> float:
        """Returns the place of a value on the axis, from 0 to 1; values beyond an end are put on it."""
        low, high, at = (math.log(one) if self.log else one for one in (self.low, self.high, value))
        return min(1.0, max(0.0, (at - low) / (high - low)))


def linear(label: str, low: float, high: float, *, percent: bool = False) -> Axis:
    """Returns an axis with four to eight labels at 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [(index * step, index * step) for index in range(first, last + 1)]
    texts = [(value, f"{100 * value:.0f}%" if percent else f"{value:.{digits}f}") for value, _ in ticks]
    return Axis(label, low, high, [(value, text.replace("-", "\u2212")) for value, text in texts])


def powers(label: str, values: Sequence[int]) -> Axis:
    """Returns a logarithmic axis that labels each of the values, such as 1, 2, 4, 8."""
    low, high = min(values), max(values)
    return Axis(label, low, high if high > low else low * 2, [(value, str(value)) for value in values], log=True)


def categories(label: str, names: Sequence[str]) -> Axis:
    """Returns an axis on which the n-th name has the value n, from 0."""
    return Axis(label, -0.5, max(1, len(names)) - 0.5, list(enumerate(map(str, names))))


class Chart:
    """One figure under construction; `svg` ends it.

    Args:
        title: Above the plot; also the figure's name for screen readers.
        x: The horizontal axis.
        y: The vertical axis; give `low` above `high` to count downwards.
        width: In pixels.
        height: In pixels, without the legend.
        left: Room for the labels of the vertical axis, in pixels.
    """

    def __init__(
        self, title: str, x: Axis, y: Axis, *, width: float = 380, height: float = 260, left: float = 50
    ) -> None:
        self._title, self._x, self._y = title, x, y
        self._width, self._height, self._left = width, height, left
        self._legend: list[tuple[str, str]] = []
        self._root = ET.Element("svg", {"class": "figure", "role": "img", "xmlns": "http://www.w3.org/2000/svg"})
        ET.SubElement(self._root, "title").text = title
        self._text(left, 14, title, "title")
        self._axes()

    def line(self, points: Sequence[Point], css: str, *, label: str = "") -> None:
        """Draws a line through points."""
        path = " ".join(f"{self._px(x)},{self._py(y)}" for x, y in points)
        self._mark("polyline", f"line {css}", label, points=path)
        self._note(label, css)

    def area(self, lower: Sequence[Point], upper: Sequence[Point], css: str, *, label: str = "") -> None:
        """Fills between two lines."""
        path = " ".join(f"{self._px(x)},{self._py(y)}" for x, y in [*lower, *reversed(upper)])
        self._mark("polygon", f"area {css}", label, points=path)
        self._note(label, css)

    def dot(self, x: float, y: float, css: str, *, radius: float = 3.5, title: str = "") -> None:
        """Draws one point."""
        self._mark("circle", f"dot {css}", title, cx=self._px(x), cy=self._py(y), r=f"{radius:.1f}")

    def interval(self, start: Point, end: Point, css: str, *, title: str = "") -> None:
        """Draws a line between two points, such as a 95% interval."""
        ends = {"x1": self._px(start[0]), "y1": self._py(start[1]), "x2": self._px(end[0]), "y2": self._py(end[1])}
        self._mark("line", f"interval {css}", title, **ends)

    def bar(self, lower: Point, upper: Point, css: str, *, title: str = "") -> None:
        """Fills between two corners, the left lower one and the right upper one."""
        left, right = float(self._px(lower[0])), float(self._px(upper[0]))
        top, bottom = float(self._py(upper[1])), float(self._py(lower[1]))
        box = {"x": left, "y": top, "width": max(0.5, right - left), "height": max(0.0, bottom - top)}
        self._mark("rect", f"bar {css}", title, **{name: f"{value:.1f}" for name, value in box.items()})

    def rule(self, *, x: float | None = None, y: float | None = None) -> None:
        """Draws a line across the plot at a value of one axis, such as 0."""
        for value, low, high, horizontal in (
            (x, self._y.low, self._y.high, False),
            (y, self._x.low, self._x.high, True),
        ):
            if value is not None:
                start, end = ((low, value), (high, value)) if horizontal else ((value, low), (value, high))
                self.interval(start, end, "rule")

    def legend(self, label: str, css: str) -> None:
        """Names the marks of a class below the plot."""
        self._note(label, css)

    def svg(self) -> str:
        """Returns the figure as an element for a page, which has the colours."""
        root, width, height = self._finished()
        # The range of both axes and the plot's corners in pixels: a page can add a mark of its own.
        root.set("data-x", f"{self._x.low!r} {self._x.high!r} {self._px(self._x.low)} {self._px(self._x.high)}")
        root.set("data-y", f"{self._y.low!r} {self._y.high!r} {self._py(self._y.low)} {self._py(self._y.high)}")
        return ET.tostring(_sized(root, width, height), encoding="unicode")

    def _finished(self) -> tuple[ET.Element, float, float]:
        """Returns the element, its width and its height, with the legend below the plot."""
        for line, (label, css) in enumerate(self._legend):
            y = self._height + _LEGEND_LINE * line
            place = {"x": f"{self._left:.1f}", "y": f"{y:.1f}", "width": "10", "height": "10"}
            ET.SubElement(self._root, "rect", {"class": f"key {css}", **place})
            self._text(self._left + 16, y + 9, label, "label")
        return self._root, self._width, self._height + _LEGEND_LINE * len(self._legend)

    def _axes(self) -> None:
        for value, text in self._x.ticks:
            self.interval((value, self._y.low), (value, self._y.high), "grid")
            self._text(float(self._px(value)), self._height - _BOTTOM + 15, text, "tick middle")
        for value, text in self._y.ticks:
            self.interval((self._x.low, value), (self._x.high, value), "grid")
            self._text(self._left - 6, float(self._py(value)) + 3.5, text, "tick end")
        middle = (self._left + self._width - _RIGHT) / 2
        self._text(middle, self._height - _BOTTOM + 31, self._x.label, "label middle")
        if self._y.label:
            label = self._text(0, 0, self._y.label, "label middle")
            label.set("transform", f"translate(12 {(_TOP + self._height - _BOTTOM) / 2:.1f}) rotate(-90)")

    def _note(self, label: str, css: str) -> None:
        if label and (label, css) not in self._legend:
            self._legend.append((label, css))

    def _px(self, value: float) -> str:
        return f"{self._left + self._x.share(value) * (self._width - self._left - _RIGHT):.1f}"

    def _py(self, value: float) -> str:
        return f"{self._height - _BOTTOM - self._y.share(value) * (self._height - _TOP - _BOTTOM):.1f}"

    def _text(self, x: float, y: float, text: str, css: str) -> ET.Element:
        element = ET.SubElement(self._root, "text", {"class": css, "x": f"{x:.1f}", "y": f"{y:.1f}"})
        element.text = text
        return element

    def _mark(self, tag: str, css: str, title: str, **attributes: str) -> None:
        element = ET.SubElement(self._root, tag, {"class": css.strip(), **attributes})
        if title:
            ET.SubElement(element, "title").text = title


def row(title: str, charts: Sequence[Chart], *, standalone: bool = False) -> str:
    """Returns several figures side by side as one.

    Args:
        title: Name of the whole for screen readers.
        charts: From left to right.
        standalone: Whether it is a file of its own, with colours and a background inside; else the page has them.
    """
    from marginrm.figures import stylesheet

    root = ET.Element("svg", {"class": "figure", "role": "img", "xmlns": "http://www.w3.org/2000/svg"})
    ET.SubElement(root, "title").text = title
    if standalone:
        ET.SubElement(root, "style").text = stylesheet("figures.css")
        ET.SubElement(root, "rect", {"class": "paper", "width": "100%", "height": "100%"})
    right, bottom = 0.0, 0.0
    for chart in charts:
        panel, width, height = chart._finished()  # noqa: SLF001 - the same module's
        group = ET.SubElement(root, "g", {"transform": f"translate({right:.1f} 0)"})
        group.extend(list(panel)[1:])  # without its title, which is drawn as text as well
        right, bottom = right + width, max(bottom, height)
    return ET.tostring(_sized(root, right, bottom), encoding="unicode")


def _sized(root: ET.Element, width: float, height: float) -> ET.Element:
    root.set("viewBox", f"0 0 {width:.0f} {height:.0f}")
    root.set("width", f"{width:.0f}")
    root.set("height", f"{height:.0f}")
    return root
