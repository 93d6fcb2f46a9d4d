"""Drift of margins: by hand, and over a real socket with a manifest's quantiles."""

from __future__ import annotations

import math
import random

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from marginrm.calibration import calibrate
from marginrm_service.telemetry.drift import Drift, Reference, psi
from support.server import serving
from support.service import FakeRewardModel

QUARTILES = {"0.25": -1.0, "0.5": 0.0, "0.75": 1.0}


def index_of(drift: Drift) -> list[float]:
    return [sample.value for metric in drift.collect() for sample in metric.samples]


def test_the_index_by_hand() -> None:
    assert psi([25, 25, 25, 25], [0.25] * 4) == pytest.approx(0)
    a, e = (80.5 / 101, 20.5 / 101), (50.5 / 101, 50.5 / 101)
    expected = sum((x - y) * math.log(x / y) for x, y in zip(a, e, strict=True))
    assert psi([80, 20], [0.5, 0.5]) == pytest.approx(expected)
    assert math.isfinite(psi([0, 100], [1.0, 0.0]))


def test_bins_lie_between_the_quantiles_and_equal_ones_are_one_edge() -> None:
    reference = Reference(QUARTILES)
    assert reference.shares == [0.25] * 4
    assert [reference.bin_of(margin) for margin in (-5, -1, -0.5, 0.5, 5)] == [0, 0, 1, 2, 3]
    tied = Reference({"0.25": 0.0, "0.5": 0.0, "0.75": 1.0})
    assert (tied.edges, tied.shares) == ([0.0, 1.0], [0.5, 0.25, 0.25])


def test_the_index_needs_enough_margins_and_starts_anew_with_a_new_model() -> None:
    drift = Drift("x", "y")
    drift.observe("m", [0.0] * 1000)
    assert index_of(drift) == []  # no reference
    drift.refer("m", QUARTILES)
    generator = random.Random(0)
    drift.observe("m", [generator.choice((-2, -0.5, 0.5, 2)) for _ in range(199)])
    assert index_of(drift) == []
    drift.observe("m", [-2.0])
    assert 0 <= index_of(drift)[0] < 0.1
    drift.observe("m", [5.0] * 10_000)  # the window holds nothing else now
    assert index_of(drift)[0] > 0.25
    drift.refer("m", QUARTILES)
    assert index_of(drift) == []


def test_a_server_reports_it_for_pairs() -> None:
    model = FakeRewardModel()
    calibration = calibrate([1.0, -1.0]).model_copy(update={"margin_quantiles": {"0.5": 1e9}})
    model.manifest = type("M", (), {"calibration": calibration, "uncertainty": None})()
    pairs = [{"prompt": f"{index}", "chosen": "Yes.", "rejected": "No."} for index in range(250)]
    with serving(model) as server, httpx.Client(base_url=server.url, timeout=120) as http:
        assert "marginrm_margin_psi{" not in http.get("/metrics").text
        http.post("/score", json={"pairs": pairs}).raise_for_status()
        found = {m.name: m.samples for m in text_string_to_metric_families(http.get("/metrics").text)}
    assert found["marginrm_margin_psi"][0].labels == {"model": "default"}
    assert found["marginrm_margin_psi"][0].value > 0.25  # all margins lie in one half
