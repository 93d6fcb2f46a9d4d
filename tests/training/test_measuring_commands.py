"""The commands `evaluate`, `compare` and `best-of-n` on tiny real models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from marginrm import RewardModel
from marginrm.cli.main import build_app
from marginrm.errors import ConfigError, DataError
from marginrm_training.evaluation.best_of_n import expected_best_of_n
from support.models import tiny_checkpoint

WORDS = ("red", "blue", "green", "no", "yes", "Paris", "bread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one shape, 40 pairs that lean to the first model's taste, and 12 groups of 4 or 6 candidates."""
    root = tmp_path_factory.mktemp("measured")
    for name, seed in (("one", 0), ("two", 1)):
        tiny_checkpoint(root / name, "llama", seed=seed)
    model = RewardModel.from_pretrained(root / "one", dtype="float32")
    generator = np.random.default_rng(0)

    def text() -> str:
        return " ".join(generator.choice(WORDS, int(generator.integers(2, 9))))

    rows, groups = [], []
    for index in range(40):
        a, b = text(), text() + " yes"
        scores = model.score(f"Question {index}?", [a, b])
        chosen, rejected = (a, b) if (scores[0] > scores[1]) != (index % 5 == 0) else (b, a)
        rows.append({"prompt": f"Question {index}?", "chosen": chosen, "rejected": rejected})
    for index in range(12):
        texts = [text() for _ in range(4 + 2 * (index % 2))]
        gold = [float(value) for value in generator.random(len(texts)).round(3)]
        candidates = [{"text": one, "quality": value} for one, value in zip(texts, gold, strict=True)]
        groups.append({"prompt": f"Task {index}?", "candidates": candidates})
    for name, content in (("pairs.jsonl", rows), ("groups.jsonl", groups), ("empty.jsonl", [])):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return root


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(build_app(), [str(one) for one in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def gold_and_rewards(folder: Path, name: str) -> tuple[list[list[float]], list[list[float]]]:
    model = RewardModel.from_pretrained(folder / name)
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines()]
    gold = [[one["quality"] for one in row["candidates"]] for row in rows]
    return gold, [model.score(row["prompt"], [one["text"] for one in row["candidates"]]) for row in rows]


def test_compare_tests_pairs_and_picks_of_two_checkpoints(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    arguments = ["compare", "--first", folder / "one", "--second", folder / "two", "--json"]
    data = ["--data", folder / "pairs.jsonl", "--candidates", folder / "groups.jsonl"]
    found = json.loads(run(*arguments, *data, "--report", page).stdout)
    assert found["pairs"] == 40
    assert found["accuracy_first"] == pytest.approx(0.8)
    assert found["difference_low"] <= found["difference"] <= found["difference_high"]
    gold, first = gold_and_rewards(folder, "one")
    _, second = gold_and_rewards(folder, "two")
    qualities = [
        [truth[int(np.argmax(rewards))] for truth, rewards in zip(gold, both, strict=True)] for both in (first, second)
    ]
    wins = sum(b > a for a, b in zip(*qualities, strict=True))
    draws = sum(b == a for a, b in zip(*qualities, strict=True))
    assert (found["prompts"], found["second_wins"], found["draws"]) == (12, wins, draws)
    assert found["win_rate"] == pytest.approx((wins + draws / 2) / 12)
    html = page.read_text(encoding="utf-8")
    for heading in ("Margins", "Best-of-N", "Only the first is right", "Only the second is right"):
        assert f"<h2>{heading}</h2>" in html
    assert f"of {found['only_first_right']:.0f} pairs" in html
    assert html.count("<svg") == 2
    text = run(*[one for one in arguments if one != "--json"], *data[2:]).stdout
    assert re.search(rf"^win_rate +{found['win_rate']:.4f}  \[", text, re.MULTILINE)
    with pytest.raises(ConfigError, match="Nothing to compare on"):
        run(*arguments)


def test_best_of_n_tells_where_its_curve_ends(folder: Path) -> None:
    result = run("best-of-n", "--model", folder / "one", "--data", folder / "groups.jsonl", "--json")
    points = json.loads(result.stdout)
    assert [point["n"] for point in points] == [1, 2, 4]
    assert "ends at N = 4: the shortest group has 4 candidates (6 of 12 prompts have more than 4)" in result.stderr
    gold, rewards = gold_and_rewards(folder, "one")
    at_two = [expected_best_of_n(group, truth, 2) for group, truth in zip(rewards, gold, strict=True)]
    assert points[1]["model"] == pytest.approx(np.mean(at_two))
    assert points[1]["model_low"] < points[1]["model"] < points[1]["model_high"]
    table = run("best-of-n", "--model", folder / "one", "--data", folder / "groups.jsonl").stdout.splitlines()
    assert table[0].split() == ["N", "KL", "model", "longest", "oracle", "random"]
    assert len(table) == 4


def test_an_empty_file_of_groups_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"empty\.jsonl: has no group of candidates"):
        run("best-of-n", "--model", folder / "one", "--data", folder / "empty.jsonl")


def test_evaluate_writes_a_report_with_intervals_and_the_best_of_n_figure(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    arguments = ["evaluate", "--model", folder / "one", "--data", folder / "pairs.jsonl"]
    result = run(*arguments, "--report", page, "--candidates", folder / "groups.jsonl")
    html = page.read_text(encoding="utf-8")
    for heading in ("Margins", "Calibration", "Best-of-N", "The worst mistakes"):
        assert f"<h2>{heading}</h2>" in html
    assert "The curve ends at N = 4" in html
    assert "8 of 8 pairs that are ranked wrong" in html
    assert re.search(r"^accuracy +0\.8000  \[0\.\d{4}, 0\.\d{4}\]$", result.stdout, re.MULTILINE)
    figures = json.loads(run(*arguments, "--json").stdout)
    assert figures["accuracy_low"] < 0.8 < figures["accuracy_high"]
    with pytest.raises(ConfigError, match="--candidates adds a figure to --report"):
        run(*arguments, "--candidates", folder / "groups.jsonl")
