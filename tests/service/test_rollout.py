"""`marginrm rollout`: two revisions behind real servers score the same traffic, and the new one may go or must stop."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from marginrm import RewardModel
from marginrm.cli.main import build_app
from marginrm.errors import ConfigError, DataError
from marginrm.rollout.comparison import kolmogorov_smirnov, shift, time_ratio, wilson
from support.models import CHATML_TEMPLATE, SENTENCES, tiny_checkpoint
from support.server import AppServer, serving

WORDS = " ".join(SENTENCES).split()
PAIRS, GROUPS = 60, 20
ROOMY = ("--max-accuracy-drop", "0.5")  # of labels at random, for so few pairs


def text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(3, 12)))


def traffic(seed: int = 0) -> list[dict[str, Any]]:
    """Pairs, groups and one single response."""
    draw = random.Random(seed)
    pairs = [{"prompt": text(draw), "chosen": text(draw), "rejected": text(draw)} for _ in range(PAIRS)]
    groups = [{"prompt": text(draw), "candidates": [text(draw) for _ in range(4)]} for _ in range(GROUPS)]
    return [*pairs, *groups, {"prompt": text(draw), "response": text(draw)}]


def changed(source: Path, target: Path, change: Any) -> Path:
    """A copy of a checkpoint with another head."""
    shutil.copytree(source, target)
    model = AutoModelForSequenceClassification.from_pretrained(source)
    with torch.no_grad():
        model.score.weight.copy_(change(model.score.weight))
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("revisions")
    old = tiny_checkpoint(folder / "old", "llama", chat_template=CHATML_TEMPLATE)
    noise = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    return {
        "old": old,
        "good": changed(old, folder / "good", lambda head: head + 0.1 * head.std() * noise),
        "broken": changed(old, folder / "broken", lambda head: -head),
    }


@pytest.fixture(scope="module")
def server(checkpoints: dict[str, Path]) -> Iterator[AppServer]:
    """All three revisions on one server."""
    loaded = [RewardModel.from_pretrained(path, name=name, dtype="float32") for name, path in checkpoints.items()]
    with serving(*loaded, reward_cache_mib=0) as running:
        yield running


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traffic") / "traffic.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in traffic()))
    return path


def rollout(*arguments: str | Path) -> tuple[int, str]:
    given = ["rollout", *map(str, arguments)]
    result = CliRunner().invoke(build_app(), given, catch_exceptions=False)
    return result.exit_code, result.stdout


def served(server: AppServer, rows: Path, new: str, *options: str) -> tuple[int, dict[str, Any]]:
    models = (*ROOMY, "--old-model", "old", "--new-model", new)
    status, said = rollout(rows, "--old", server.url, "--new", server.url, *models, "--json", *options)
    return status, json.loads(said)


def plain_rewards(path: Path) -> list[list[float]]:
    """The rewards of the traffic by transformers alone."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    def reward(prompt: str, response: str) -> float:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            return float(model(ids).logits[0, 0])

    texts = [
        row.get("candidates") or [row[f] for f in ("chosen", "rejected", "response") if f in row] for row in traffic()
    ]
    return [
        [reward(row["prompt"], response) for response in given] for row, given in zip(traffic(), texts, strict=True)
    ]


def test_a_good_revision_goes_and_the_figures_are_those_of_transformers(
    server: AppServer, checkpoints: dict[str, Path], rows: Path
) -> None:
    status, said = served(server, rows, "good")
    assert (status, said["verdict"]) == (0, "go")
    assert said["rows"] == {
        "compared": PAIRS + GROUPS + 1,
        "pairs": PAIRS,
        "groups": GROUPS,
        "items": 1,
        "unreadable": 0,
        "scored_by_neither": 0,
        "scored_by_old_only": 0,
        "scored_by_new_only": 0,
    }
    found = {check["name"]: check["value"] for check in said["checks"]}
    old, new = plain_rewards(checkpoints["old"]), plain_rewards(checkpoints["good"])
    same = [
        np.mean([(a[i] > a[j]) == (b[i] > b[j]) for i, j in combinations(range(len(a)), 2)])
        for a, b in zip(old, new, strict=True)
        if len(a) > 1
    ]
    assert found["preferences that agree"] == pytest.approx(np.mean(same))
    assert 0.9 < np.mean(same) < 1
    groups = [(np.argmax(a), np.argmax(b)) for a, b in zip(old, new, strict=True) if len(a) == 4]
    assert found["picks that agree"] == pytest.approx(np.mean([a == b for a, b in groups]))
    right = [np.mean([row[0] > row[1] for row in side if len(row) == 2]) for side in (old, new)]
    assert found["change of accuracy"] == pytest.approx(right[1] - right[0])
    flat = [np.concatenate(side) for side in (old, new)]
    expected = (flat[1].mean() - flat[0].mean()) / np.sqrt((flat[0].var() + flat[1].var()) / 2)
    assert found["shift of rewards"] == pytest.approx(expected, abs=1e-4)


def test_a_revision_with_a_negated_head_stops(server: AppServer, checkpoints: dict[str, Path], rows: Path) -> None:
    status, said = served(server, rows, "broken")
    assert (status, said["verdict"]) == (1, "stop")
    checks = {check["name"]: check for check in said["checks"]}
    assert checks["preferences that agree"]["value"] == pytest.approx(0, abs=0.01)
    assert not checks["preferences that agree"]["ok"]
    assert not checks["picks that agree"]["ok"]
    plain = rollout(rows, "--old", checkpoints["old"], "--new", checkpoints["broken"], "--dtype", "float32")
    assert plain[0] == 1
    assert plain[1].splitlines()[-1] == "STOP"


def test_checkpoints_that_are_loaded_here_give_the_servers_figures(
    server: AppServer, checkpoints: dict[str, Path], rows: Path
) -> None:
    _, there = served(server, rows, "good")
    here = rollout(
        rows, "--old", checkpoints["old"], "--new", checkpoints["good"], "--dtype", "float32", "--json", *ROOMY
    )
    assert here[0] == 0
    for one, other in zip(json.loads(here[1])["checks"], there["checks"], strict=True):
        assert one["name"] == other["name"]
        if not one["name"].startswith("time"):
            assert one["value"] == pytest.approx(other["value"], abs=1e-3)


def test_bodies_of_requests_are_traffic_and_rows_that_only_the_old_revision_scores_stop(
    server: AppServer, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    short = shutil.copytree(checkpoints["old"], tmp_path / "short")
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((short / name).read_text())
        fields |= {key: 200 for key in ("max_position_embeddings", "model_max_length") if key in fields}
        (short / name).write_text(json.dumps(fields))
    given = traffic()
    long = {"prompt": "word " * 90, "chosen": "Yes.", "rejected": "No."}
    body = {"model": "old", "pairs": [*given[:PAIRS], long], "items": [given[-1], {"prompt": "", "response": "Yes."}]}
    path = tmp_path / "requests.jsonl"
    groups = [{"prompt": row["prompt"], "candidates": row["candidates"]} for row in given[PAIRS:-1]]
    path.write_text(f"{json.dumps(body)}\n{json.dumps({'prompts': groups})}\nnot json\n")
    place = ("--old", server.url, "--old-model", "old", "--new", str(short), "--dtype", "float32", "--json")
    status, said = rollout(path, *place)
    counts = json.loads(said)["rows"]
    assert (status, counts["compared"], counts["pairs"], counts["groups"]) == (1, PAIRS + GROUPS + 1, PAIRS, GROUPS)
    assert (counts["unreadable"], counts["scored_by_neither"], counts["scored_by_old_only"]) == (1, 1, 1)
    failed = [check for check in json.loads(said)["checks"] if not check["ok"]]
    assert [(check["name"], check["note"]) for check in failed] == [
        ("rows that only OLD can score", "1 sequence_too_long")
    ]
    assert rollout(path, *place, "--max-lost", "0.02")[0] == 0


def test_too_little_traffic_stops_and_labels_may_be_left_out(server: AppServer, rows: Path) -> None:
    status, said = served(server, rows, "good", "--limit", "8")
    stopped = [check["name"] for check in said["checks"] if not check["ok"]]
    assert (status, stopped[0]) == (1, "preferences that agree")
    assert "too few for this bound" in said["checks"][0]["note"]
    assert any("it takes 9 batches" in note for note in said["notes"])
    names = {check["name"] for check in served(server, rows, "good", "--no-labels", "--batch", "8")[1]["checks"]}
    assert "time, NEW / OLD" in names
    assert not names & {"change of accuracy", "rise of the ECE"}


def test_times_of_cached_rewards_are_not_compared(checkpoints: dict[str, Path], rows: Path) -> None:
    with serving(RewardModel.from_pretrained(checkpoints["old"], dtype="float32")) as old:
        status, said = rollout(rows, "--old", old.url, "--new", old.url)
    assert status == 0
    assert "of the responses came from a reward cache" in said
    assert "Both serve the same revision." in said


def test_wrong_names_and_other_files_are_errors(server: AppServer, rows: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "no preference"}\n')
    with pytest.raises(ConfigError, match=r"serves no model 'gone', but broken, good, old\."):
        rollout(rows, "--old", server.url, "--old-model", "old", "--new", server.url, "--new-model", "gone")
    with pytest.raises(DataError, match="none of its first 1 rows can be scored"):
        rollout(other, "--old", server.url, "--new", server.url)


def test_intervals_and_distances_are_those_of_the_literature() -> None:
    # Agresti and Coull (1998): no success in 10 trials has the score interval 0 to 0.278.
    none = wilson(0, 10)
    assert (none.low, none.high) == pytest.approx((0, 0.278), abs=0.001)
    assert kolmogorov_smirnov([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5
    assert kolmogorov_smirnov([1, 1, 2], [1, 1, 2]) == 0
    assert shift([0, 2], [1, 3]) == 1
    assert shift([1, 1], [2, 2]) == float("inf")
    slower = time_ratio([(1.0, 2.0)] * 10)
    assert slower is not None
    assert (slower.value, slower.low, slower.high) == (2, 2, 2)
