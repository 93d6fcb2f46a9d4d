"""The audit: the model of label noise, folds by prompt, judgements without memory, and the command with its resume."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from marginrm.cli.main import build_app
from marginrm.errors import ConfigError
from marginrm_training.audit.cross_fit import audited_pairs, cross_fit, folds_by_prompt
from marginrm_training.audit.suspects import fit_label_noise, in_units, suspects
from marginrm_training.config import load_config
from marginrm_training.data.splits import EncodedPair
from support.models import tiny_checkpoint
from support.training import BAD, GOOD, config_file, write


def swapped(count: int, wrong: set[int]) -> list[dict]:
    """Two pairs to a prompt, good against bad, with the labels of `wrong` exchanged."""
    found = []
    for index in range(count):
        sides = [GOOD[index % 4], BAD[(index + index // 4) % 4]]
        chosen, rejected = reversed(sides) if index in wrong else sides
        found.append({"prompt": f"Question {index // 2}: what is it?", "chosen": chosen, "rejected": rejected})
    return found


def audit(*arguments: str | Path) -> tuple[int, str]:
    command = EntryPoint("audit", "marginrm_training.audit.cli:audit", "marginrm.commands")
    other = EntryPoint("demo", "marginrm_training.cli:demo", "marginrm.commands")  # a lone command has no name
    result = CliRunner().invoke(build_app([command, other]), ["audit", *map(str, arguments)])
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_the_share_of_wrong_labels_is_recovered(share: float) -> None:
    generator = np.random.default_rng(0)
    true = generator.normal(0, 3, 20_000)
    labelled = np.where(generator.random(20_000) < 1 / (1 + np.exp(-true / 0.7)), 1, -1)
    exchanged = generator.random(20_000) < share
    noise = fit_label_noise(true * labelled * np.where(exchanged, -1, 1))
    assert noise.share == pytest.approx(share, abs=0.02)
    assert noise.temperature == pytest.approx(0.7, abs=0.15)


def test_suspects_are_ranked_by_the_probability_that_their_label_is_wrong() -> None:
    noise = fit_label_noise(np.array([3.0, 2.0, 4.0, 3.0, 1.0, -3.0, -0.5]))
    pairs: list[EncodedPair] = [object()] * 3  # type: ignore[list-item]  # only passed through
    found = suspects(pairs, np.array([-3.0, 2.0, -0.5]), noise, above=0.0)
    assert [one.margin for one in found] == [-3.0, -0.5, 2.0]
    p = 1 / (1 + np.exp(3.0 / noise.temperature))
    assert found[0].wrong == pytest.approx(noise.share * (1 - p) / (noise.share * (1 - p) + (1 - noise.share) * p))
    assert found[0].confidence == pytest.approx(1 - p)
    assert [one.margin for one in suspects(pairs, np.array([-3.0, 2.0, -0.5]), noise, above=found[0].wrong)] == [-3.0]


def test_folds_of_different_scales_are_made_comparable() -> None:
    one = np.array([1.0, 2.0, -1.0, 0.5])
    same, tenfold = in_units([one, 10 * one])
    assert tenfold == pytest.approx(same)


def test_a_pair_is_judged_by_a_model_that_never_saw_its_prompt(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", "gpt_neox")
    path = config_file(tmp_path, 64, optim={"epochs": 6.0})
    # Labels at random: a model knows them only from training on them.
    wrong = set(np.flatnonzero(np.random.default_rng(0).random(64) < 0.5).tolist())
    data = write(tmp_path / "random.jsonl", swapped(64, wrong))
    config = load_config(path, [f"data.train={data}", "method.preset=bt"])
    pairs = audited_pairs(config).pairs
    places = folds_by_prompt(pairs, 2, seed=0)
    assert sorted(places[0] + places[1]) == list(range(len(pairs)))
    prompts = [{pairs[place].pair.prompt for place in fold} for fold in places]
    assert not prompts[0] & prompts[1]
    d = cross_fit(config, pairs, places[0], 1, tmp_path, resume=True)
    assert 0.2 < float((d > 0).mean()) < 0.8
    with pytest.raises(ConfigError, match=r"fold-1\.json belongs to an audit with other settings"):
        cross_fit(load_config(path, ["seed=1"]), pairs, places[0], 1, tmp_path, resume=True)
    with pytest.raises(ConfigError, match="100 folds need as many prompts"):
        folds_by_prompt(pairs, 100, seed=0)


def test_the_command_finds_exchanged_labels_resumes_by_fold_and_writes_the_rest(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", "gpt_neox")
    wrong = {3, 20, 33, 47, 58, 70}
    data = write(tmp_path / "pairs.jsonl", swapped(96, wrong))
    settings = ["--set", "optim.learning_rate=1e-2", "--set", "optim.pairs_per_step=16", "--set", "optim.epochs=4"]
    command = [data, "--model", tmp_path / "base", *settings, "--folds", 2, "--output", tmp_path / "audit"]
    code, output = audit(*command, "--dry-run")
    assert code == 0, output
    assert "2 trainings of about 48 pairs each" in output
    assert not (tmp_path / "audit").exists()
    code, output = audit(*command, "--without", tmp_path / "kept.jsonl")
    assert code == 0, output
    found = [json.loads(line) for line in (tmp_path / "audit" / "suspects.jsonl").read_text().splitlines()]
    lines = {int(one["source"].rpartition(":")[2]) - 1 for one in found}
    assert lines == wrong
    assert f"{data}:{found[0]['source'].rpartition(':')[2]}  wrong" in output
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept == [row for index, row in enumerate(swapped(96, wrong)) if index not in lines]
    before = (tmp_path / "audit" / "fold-1.json").stat().st_mtime_ns
    (tmp_path / "audit" / "fold-2.json").unlink()
    code, again = audit(*command)
    assert code == 0, again
    assert (tmp_path / "audit" / "fold-1.json").stat().st_mtime_ns == before
    assert again.partition("estimated")[2] == output.partition("estimated")[2].replace(
        f"90 rows without the suspects written to {tmp_path / 'kept.jsonl'}\n", ""
    )


def test_pairs_without_a_model_say_what_to_add(tmp_path: Path) -> None:
    code, output = audit(write(tmp_path / "pairs.jsonl", swapped(8, set())))
    assert code == 1
    assert "Add --model BACKBONE" in output


def test_rows_are_never_written_over_those_that_are_audited(tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", swapped(4, set()))
    for without, fault in ((pairs, "is the file that is audited"), (tmp_path / "no" / "x", "in a folder that exists")):
        code, output = audit(pairs, "--model", "/nowhere", "--without", without)  # refused before the model is loaded
        assert code == 1
        assert fault in output
