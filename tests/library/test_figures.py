"""Figures: valid SVG without colours or scripts in it, values at the places that the axes say, and Wilson's interval by hand."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from marginrm.calibration import calibrate
from marginrm.figures import drawings, stylesheet
from marginrm.figures.chart import categories, linear, powers

SVG = "{http://www.w3.org/2000/svg}"
MARGINS = np.random.default_rng(0).normal(1, 1.5, 400)


def marks(svg: str, css: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(svg).iter() if css in element.get("class", "").split()]


def test_an_axis_puts_values_between_its_ends_and_labels_round_numbers() -> None:
    axis = linear("x", -0.3, 1.1)
    assert [text for _, text in axis.ticks] == ["0.0", "0.5", "1.0"]
    assert [axis.share(value) for value in (-0.3, 0.4, 1.1, 7, -7)] == pytest.approx([0, 0.5, 1, 1, 0])
    assert [text for _, text in linear("", 0, 1, percent=True).ticks] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    assert powers("N", [1, 2, 4]).share(2) == pytest.approx(0.5)
    assert categories("", ["a", "b"]).share(0) == pytest.approx(0.25)
    assert linear("", 3, 3).share(3) == pytest.approx(0.5)  # one value alone is in the middle


def test_a_downward_axis_has_its_low_end_at_the_top() -> None:
    panels = {"a": {"first": (0.5, 0.4, 0.6), "second": (0.7, 0.6, 0.8)}, "b": {"first": None, "second": None}}
    svg = drawings.estimates(panels, zero=("b",))
    heights = [float(dot.get("cy", "")) for dot in marks(svg, "dot")]
    assert len(heights) == 2
    assert heights[0] < heights[1]
    assert len(marks(svg, "rule")) == 1


def test_every_figure_is_svg_that_takes_its_colours_from_classes() -> None:
    measured = calibrate(MARGINS)
    figures = [
        drawings.reliability({"T = 1": measured.reliability_before, "calibrated": measured.reliability}),
        drawings.reliability({"calibrated": []}),
        drawings.risk_coverage(measured.risk_coverage),
        drawings.margin_quantiles(measured.margin_quantiles),
        drawings.margin_quantiles({"0.5": 0.0}),
        drawings.margin_histogram({"a": [1, 2], "b": [0, 0]}, [-1, 0, 1]),
        drawings.margin_histogram({"a": [1], "b": [1], "c": [1]}, [-1, 1]),
        drawings.lines("loss", "nats", {"loss": [(1, 0.7), (2, 0.6)], "eval_loss": [(2, 0.65)]}),
        drawings.drift([0.5, 0.5], [0.9, 0.1], [0.0]),
        drawings.strength_bars({"accuracy_strength_0.5_0.6": 0.5, "pairs_strength_0.5_0.6": 20.0}) or "",
    ]
    for svg in figures:
        root = ET.fromstring(svg)
        assert root.tag == f"{SVG}svg"
        assert root.find(f"{SVG}title") is not None
        assert not re.search(r"style=|fill=|stroke=|<script|href", svg)
        assert not re.search(r"nan|inf", svg)
    assert drawings.strength_bars({"accuracy": 1.0}) is None


def test_a_file_of_its_own_holds_its_colours() -> None:
    panels = {"<b>&": {"<i>": (0.5, 0.4, 0.6)}}
    alone = drawings.estimates(panels, standalone=True)
    assert alone == drawings.estimates(panels, standalone=True)
    style = ET.fromstring(alone).find(f"{SVG}style")
    assert style is not None
    assert style.text == stylesheet("figures.css")
    assert "&lt;b&gt;&amp;" in alone
    assert "<b>" not in alone


def test_points_of_the_reliability_figure_lie_where_their_bins_are() -> None:
    bins = calibrate(MARGINS).reliability
    svg = drawings.reliability({"calibrated": bins})
    low, high, left, right = map(float, ET.fromstring(svg).get("data-x", "").split())
    found = [low + (float(dot.get("cx", "")) - left) / (right - left) * (high - low) for dot in marks(svg, "dot")]
    assert found == pytest.approx([one.confidence for one in bins if one.count], abs=2e-3)


def test_wilsons_interval_by_hand() -> None:
    """Wilson (1927) for 8 of 10, as statsmodels' `proportion_confint(8, 10, method="wilson")` gives it."""
    assert drawings.wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert drawings.wilson(1.0, 5)[1] == 1
    assert drawings.wilson(0.0, 5)[0] == 0
