"""Calibration: known temperatures are recovered, and the measures agree with their definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marginrm import ranking
from marginrm.calibration import (
    T_MAX,
    T_MIN,
    calibrate,
    calibrate_uncertain,
    correctness,
    fit_temperature,
    sigmoid,
    temperature_interval,
)
from marginrm.errors import CalibrationError, NonFiniteRewardError


def nll(margins: Sequence[float], temperature: float) -> float:
    return float(np.logaddexp(0, -np.asarray(margins) / temperature).mean())


def known(temperature: float, count: int = 20_000, seed: int = 0) -> list[float]:
    """Returns margins of pairs whose labels follow sigmoid(d / T): positive where the label agrees with the reward."""
    generator = np.random.default_rng(seed)
    size = np.abs(generator.normal(0, 2 * temperature, count))
    right = generator.random(count) < 1 / (1 + np.exp(-size / temperature))
    return list(np.where(right, size, -size))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_recovered(temperature: float) -> None:
    margins = known(temperature)
    assert fit_temperature(margins) == pytest.approx(temperature, rel=0.05)
    found = calibrate(margins)
    assert found.ece_after < 0.02
    assert found.nll_after <= found.nll_before + 1e-12


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=30))
def test_no_temperature_on_a_grid_is_better(margins: list[float]) -> None:
    best = nll(margins, fit_temperature(margins))
    assert all(best <= nll(margins, math.exp(step / 10)) + 1e-9 for step in range(-41, 42))


def test_the_interval_covers_the_true_temperature_at_its_nominal_rate() -> None:
    held = 0
    for seed in range(400):
        margins = known(1.5, 200, seed)
        interval = temperature_interval(margins, fit_temperature(margins))
        assert interval is not None
        held += interval[0] <= 1.5 <= interval[1]
    assert 0.92 <= held / 400 <= 0.98


def test_a_temperature_of_few_pairs_has_a_note() -> None:
    few, many = calibrate(known(1.5, 40)), calibrate(known(1.5, 2000))
    assert few.temperature_interval is not None
    low, high = few.temperature_interval
    assert few.note == (
        f"These 40 pairs determine T only to between {low:.2f} and {high:.2f} (95%). "
        "Calibrate on more pairs, similar to those to be scored."
    )
    assert many.note is None


@pytest.mark.parametrize("margins", [[0.0, 0.0], [1.0, 2.0], [-1.0, -2.0]])
def test_a_temperature_that_is_a_bound_has_no_interval(margins: list[float]) -> None:
    found = calibrate(margins)
    assert found.temperature in {1.0, T_MIN, T_MAX}
    assert found.temperature_interval is None
    assert found.note


def test_the_temperature_scales_with_the_margins() -> None:
    margins = known(1.0, 500)
    assert fit_temperature([2 * d for d in margins]) == pytest.approx(2 * fit_temperature(margins))


def test_the_measures_by_hand() -> None:
    d = math.log(3)  # confidence 0.75
    found = calibrate([d, d, d, -d], temperature=1.0)  # right in 0.75 of the cases
    assert found.ece_before == pytest.approx(0.0, abs=1e-9)
    assert found.brier_before == pytest.approx((3 * 0.25**2 + 0.75**2) / 4)
    assert found.n == 4


def test_empty_and_non_finite_margins_are_refused() -> None:
    with pytest.raises(CalibrationError):
        fit_temperature([])
    with pytest.raises(NonFiniteRewardError):
        fit_temperature([1.0, math.nan])


@given(st.lists(st.floats(-800, 800), min_size=1, max_size=20))
def test_the_logistic_of_an_array_is_that_of_a_number(values: list[float]) -> None:
    assert sigmoid(values).tolist() == pytest.approx([ranking.sigmoid(value) for value in values], rel=1e-15)
    assert ranking.sigmoid(-800.0) >= 0.0


def test_a_tie_counts_half() -> None:
    assert correctness([[2.0, 0.0], [-1.0, -0.0]]).tolist() == [[1.0, 0.5], [0.0, 0.5]]
    assert float(correctness(0.0)) == 0.5


def test_a_temperature_beside_uncertainty_has_the_notes_of_any_other() -> None:
    generator = np.random.default_rng(0)
    unrelated = generator.normal(size=400)
    found = calibrate_uncertain(-np.abs(unrelated), np.full(400, 0.1))
    assert (found.temperature, found.temperature_interval) == (64.0, None)
    assert found.note
    assert "upper bound" in found.note
    right = calibrate_uncertain(np.abs(unrelated) + 1, np.full(400, 0.1))
    assert (right.temperature, right.temperature_interval) == (1 / 64, None)
    assert right.note
    assert "lower bound" in right.note
    same = calibrate_uncertain(np.zeros(5), np.ones(5))
    assert (same.temperature, same.note) == (1.0, "All margins are 0, so any temperature fits; T = 1 was kept.")
    few = calibrate_uncertain(np.array([1.0, 2.0, -1.0, 1.5, 0.5, -0.7]), np.full(6, 0.01))
    assert few.note
    assert "determine T only to between" in few.note
