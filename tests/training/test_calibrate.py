"""`marginrm calibrate`: a temperature for plain checkpoints, and the cure that a broken manifest's error promises."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from marginrm import RewardModel
from marginrm.cli.main import build_app
from marginrm.errors import DataError, ManifestError, ModelError
from marginrm.manifest import MANIFEST_NAME, Manifest
from marginrm.reading import ReadingOptions
from marginrm_training.checkpoint.recalibrate import BROKEN, recalibrate
from support.models import tiny_checkpoint
from support.process_rewards import FORMS
from support.server import serving
from support.training import rows, write


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows(40))


@pytest.fixture
def checkpoint(tmp_path: Path, pairs: Path) -> Path:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    recalibrate(folder, str(pairs))
    return folder


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.output


def edited(text: str) -> str:
    return json.dumps(json.loads(text) | {"a_field": "of another version"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"schema_version": 1', '"schema_version": 9'),
        edited,
    ],
    ids=["half a file", "another schema version", "an unknown field"],
)
def test_the_cure_that_a_broken_manifest_names_works(
    checkpoint: Path, pairs: Path, damage: Callable[[str], str]
) -> None:
    path = checkpoint / MANIFEST_NAME
    before = Manifest.load(checkpoint)
    broken = damage(path.read_text(encoding="utf-8"))
    path.write_text(broken, encoding="utf-8")
    with pytest.raises(ManifestError) as refused:
        RewardModel.from_pretrained(checkpoint)
    advice = re.search(r"`marginrm (\w+)", str(refused.value))
    assert advice is not None

    code, told = run(advice[1], "--model", checkpoint, "--data", pairs)

    assert code == 0
    assert f"the old one is kept as {checkpoint / BROKEN}" in told
    assert (checkpoint / BROKEN).read_text(encoding="utf-8") == broken
    model = RewardModel.from_pretrained(checkpoint, dtype="float32")
    assert model.info.calibrated
    assert model.verify_golden() == pytest.approx(0, abs=1e-5)
    assert model.manifest is not None
    assert before is not None
    assert model.manifest.calibration == before.calibration


def test_a_manifest_that_can_be_read_keeps_all_but_its_calibration(checkpoint: Path, pairs: Path) -> None:
    path = checkpoint / MANIFEST_NAME
    recorded = json.loads(path.read_text(encoding="utf-8")) | {"training": {"seed": 7}, "calibration": None}
    path.write_text(json.dumps(recorded), encoding="utf-8")
    code, told = run("calibrate", "--model", checkpoint, "--data", pairs)
    assert code == 0
    assert "temperature" in told
    assert not (checkpoint / BROKEN).exists()
    again = json.loads(path.read_text(encoding="utf-8"))
    assert again["calibration"]["n"] == 40
    assert again | {"calibration": None} == recorded


def test_a_hub_name_is_refused_with_the_reason(pairs: Path) -> None:
    with pytest.raises(ModelError, match="owner/name is not a folder"):
        recalibrate(Path("owner/name"), str(pairs))


@pytest.mark.parametrize("form", FORMS)
def test_the_manifest_records_how_steps_are_read(tmp_path: Path, pairs: Path, form: str) -> None:
    make, options = FORMS[form]
    make(tmp_path)
    before = RewardModel.from_pretrained(tmp_path, dtype="float32", reading=ReadingOptions(**options, aggregate="mean"))
    recalibrate(tmp_path, str(pairs), reading=ReadingOptions(**options, aggregate="mean"))
    model = RewardModel.from_pretrained(tmp_path, dtype="float32")
    assert model.info.calibrated
    assert model.verify_golden() == pytest.approx(0, abs=1e-5)
    assert model.steps == before.steps
    responses = [["One.", "Two."], "One.\n\nThree."]
    assert model.score("Count.", responses) == pytest.approx(before.score("Count.", responses), abs=1e-6)


def test_candidates_calibrate_choices_and_every_ranking_says_so(checkpoint: Path, pairs: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    words = ("red", "blue", "green", "Paris", "bread", "yes", "no")
    groups = [
        {
            "prompt": f"Task {index}?",
            "candidates": [
                {"text": " ".join(generator.choices(words, k=generator.randint(2, 8))), "quality": generator.random()}
                for _ in range(4)
            ],
        }
        for index in range(24)
    ]
    file = write(tmp_path / "groups.jsonl", groups)
    before = RewardModel.from_pretrained(checkpoint, dtype="float32").best_of_n("Task?", ["red", "blue", "no"])
    assert before.confidence_from == "pairs"

    code, told = run("calibrate", "--model", checkpoint, "--data", pairs, "--candidates", file)

    assert code == 0
    assert "choices among N: T" in told
    model = RewardModel.from_pretrained(checkpoint, dtype="float32")
    assert model.manifest is not None
    assert model.manifest.groups is not None
    found = model.manifest.groups
    assert found.prompts == 24
    assert [(one.n, one.prompts, one.sets) for one in found.by_n] == [(2, 24, 48), (4, 24, 24)]
    ranking = model.best_of_n("Task?", ["red", "blue", "no"])
    assert ranking.confidence_from == "groups"
    assert ranking.margin is not None
    expected = 1 / (1 + math.exp(-ranking.margin / found.temperature.of_pick(3)))
    assert ranking.confidence == pytest.approx(expected)
    shown = json.loads(run("best-of-n", "--model", checkpoint, "--data", file, "--json")[1].splitlines()[-1])
    assert [point.get("confidence_from") for point in shown] == [None, "groups", "groups"]
    with serving(model) as server:
        body = {"prompts": [{"prompt": "Task?", "candidates": ["red", "blue", "no"]}]}
        reply = httpx.post(f"{server.url}/best-of-n", json=body, timeout=60).json()
    assert reply["prompts"][0]["confidence_from"] == "groups"
    assert reply["prompts"][0]["confidence"] == pytest.approx(expected)
    assert reply["model"]["groups"]["largest"] == 4
    run("calibrate", "--model", checkpoint, "--data", pairs)
    again = Manifest.load(checkpoint)
    assert again is not None
    assert again.groups is None  # fitted beside another temperature


def test_too_few_groups_are_refused_with_the_file(checkpoint: Path, pairs: Path, tmp_path: Path) -> None:
    group = {"prompt": "Task?", "candidates": [{"text": "a", "gold": 1}, {"text": "b", "gold": 0}]}
    file = write(tmp_path / "groups.jsonl", [group])
    with pytest.raises(DataError, match=r"groups\.jsonl: Only 1 prompts have two candidates or more.* needs 20"):
        recalibrate(checkpoint, str(pairs), candidates=str(file))
