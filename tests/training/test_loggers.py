"""Loggers are Trainer's own: `loggers = ["tensorboard"]` writes event files that hold the method's quantities."""

from __future__ import annotations

import json
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from marginrm.errors import ConfigError
from marginrm_training.config import parse_config
from marginrm_training.run.train import train
from support.models import tiny_checkpoint


def scalars(file: Path) -> dict[str, dict[int, float]]:
    """Reads a TFRecord file of events: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    content, place = file.read_bytes(), 0
    found: dict[str, dict[int, float]] = {}
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        event = Event.FromString(content[place + 12 : place + 12 + length])
        place += 16 + length
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_gets_the_learning_curve(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", "gpt_neox")
    rows = [{"prompt": f"Question {n}?", "chosen": f"Good {n}.", "rejected": f"Bad {n}."} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = parse_config(
        {
            "output": str(tmp_path / "out"),
            "log_every": 1,
            "eval_every": 2,
            "loggers": ["tensorboard"],
            "model": {"path": str(tmp_path / "base")},
            "data": {"train": str(tmp_path / "pairs.jsonl"), "calibration_share": 0.1, "test_share": 0.1},
            "optim": {"learning_rate": 1e-3, "pairs_per_step": 16, "train_batch": 16},
        },
        "test",
    )
    train(config)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    found = scalars(file)
    lines = [json.loads(line) for line in (tmp_path / "out" / "learning_curve.jsonl").read_text().splitlines()]
    for name in ("loss", "bt_nll", "accuracy", "fire_rate", "mu_B", "target_margin", "d_std"):
        expected = {int(line["step"]): pytest.approx(line[name], rel=1e-5, abs=1e-6) for line in lines if name in line}
        assert found[f"train/{name}"] == expected
    for name in ("accuracy", "bt_nll"):
        at = {
            int(line["step"]): pytest.approx(line[f"eval_{name}"], rel=1e-5) for line in lines if "eval_bt_nll" in line
        }
        assert list(at) == [2, 3]  # the last step too
        assert found[f"eval/{name}"] == at


@pytest.mark.parametrize(("name", "message"), [("tensorbord", "not supported"), ("wandb", "wandb")])
def test_a_missing_logger_is_refused_before_data_are_read(tmp_path: Path, name: str, message: str) -> None:
    if find_spec(name):
        pytest.skip(f"{name} is installed here")
    paths = {"model": {"path": str(tmp_path / "none")}, "data": {"train": str(tmp_path / "none.jsonl")}}
    config = parse_config({"output": str(tmp_path / "out"), "loggers": [name], **paths}, "test")
    with pytest.raises(ConfigError, match=rf"loggers: '{name}' cannot be used: .*{message}"):
        train(config)
