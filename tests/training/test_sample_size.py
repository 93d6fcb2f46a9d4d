"""The half width of an accuracy's interval, and the pairs that a given one takes, against simulated evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from marginrm.cli.main import build_app
from marginrm_training.evaluation.sample_size import half_width, pairs_within
from support.models import tiny_checkpoint
from support.training import rows, write


def margins(right: int, wrong: int) -> np.ndarray:
    return np.array([1.0] * right + [-1.0] * wrong)


@pytest.mark.parametrize(("accuracy", "within"), [(0.65, 0.02), (0.8, 0.05), (0.95, 0.02)])
def test_as_many_pairs_as_it_says_are_within_the_width_in_95_of_100_evaluations(accuracy: float, within: float) -> None:
    generator = np.random.default_rng(0)
    needed = pairs_within(margins(round(2000 * accuracy), round(2000 * (1 - accuracy))), within)
    found = generator.binomial(needed, accuracy, size=20_000) / needed
    assert np.mean(np.abs(found - accuracy) <= within) == pytest.approx(0.95, abs=0.012)
    again = margins(round(needed * accuracy), needed - round(needed * accuracy))
    assert half_width(again) == pytest.approx(within, rel=0.03)


def test_extreme_and_tied_pairs() -> None:
    assert half_width(margins(10, 0)) > 0.1
    assert half_width(np.zeros(100)) == pytest.approx(1.96 * 0.5 / np.sqrt(104))
    assert pairs_within(margins(10, 0), 0.5) == 1


def test_evaluate_prints_the_width_and_the_pairs(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", "llama")
    data = write(tmp_path / "pairs.jsonl", rows(40))
    command = ["evaluate", "--model", str(checkpoint), "--data", str(data), "--json", "--to-within", "0.02"]
    result = CliRunner().invoke(build_app(), command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["accuracy_half_width"] > 0.05
    assert found["pairs_to_within_0.02"] == round(found["pairs_to_within_0.02"]) > 500
    assert {"pairs_style_for", "pairs_style_against", "pairs_style_neither"} <= found.keys()
