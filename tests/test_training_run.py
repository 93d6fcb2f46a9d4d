"""Whole runs on a tiny real model: data checks, overfitting, resuming, and a checkpoint that serves what was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marginrm import RewardModel
from marginrm.errors import ConfigError, ManifestError
from marginrm.loading import load_for_training
from marginrm.manifest import Manifest
from marginrm_training.config import TrainConfig, parse_config
from marginrm_training.data import encode_pairs, load_splits, read
from marginrm_training.evaluation import score_pairs
from marginrm_training.margins import PRESETS
from marginrm_training.run import train
from marginrm_training.trainer import MarginTrainer
from support_models import tiny_checkpoint

GOOD = ("Red, yellow and blue.", "Paris is the capital.", "Put it into boiling water.", "Yeast eats sugar.")
BAD = ("No.", "I do not know.", "Ask somebody else, please.", "0123456789")


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"Question {index // 2}: what is it?",
            "chosen": GOOD[index % 4],
            "rejected": BAD[(index + index // 4) % 4],
            "strength": 0.6 + 0.3 * (index % 2),
        }
        for index in range(count)
    ]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


Make = Callable[..., TrainConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    tiny_checkpoint(tmp_path / "base", "gpt_neox")
    data = write(tmp_path / "pairs.jsonl", rows(64))

    def build(output: str = "out", preset: str = "margin", **optim: Any) -> TrainConfig:
        return parse_config(
            {
                "output": str(tmp_path / output),
                "log_every": 1,
                "save_every": 4,
                "model": {"path": str(tmp_path / "base")},
                "data": {"train": str(data), "calibration_share": 0.1, "test_share": 0.1},
                "method": {"preset": preset},
                "optim": {"learning_rate": 1e-2, "pairs_per_step": 16, "train_batch": 16, "epochs": 3.0} | optim,
            },
            "test",
        )

    return build


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_overfits_64_pairs(tmp_path: Path, make: Make, preset: str) -> None:
    config = make(preset=preset, epochs=12.0)
    content = [row | {"margin": 0.5} for row in rows(64)]
    data = write(tmp_path / "all.jsonl", content)
    module, encoder = load_for_training(config.model.path, seed=0)
    pairs = encode_pairs("train", read(str(data)), encoder, config.method.method()).pairs
    trainer = MarginTrainer(module, pairs, config, tmp_path / "steps", progress=False)
    trainer.train()
    assert (score_pairs(RewardModel.from_module(module, encoder), pairs).d > 0).all()
    assert {"loss", "bt_nll", "accuracy", "d_mean", "d_std", "mu_B", "target_margin", "fire_rate", "grad_norm"} <= set(
        trainer.history[-1]
    )


def test_a_run_writes_a_checkpoint_that_serves_what_it_measured(tmp_path: Path, make: Make) -> None:
    manifest = train(make())
    assert manifest is not None
    assert manifest.calibration is not None
    assert manifest.method is not None
    assert manifest.method.preset == "margin"
    output = tmp_path / "out"
    model = RewardModel.from_pretrained(output, dtype="float32")
    assert model.verify_golden() == pytest.approx(0, abs=1e-5)
    assert model.info.calibrated
    sample = manifest.golden[0]
    code = (
        "import sys; from marginrm import RewardModel\n"
        f"m = RewardModel.from_pretrained({str(output)!r}, dtype='float32')\n"
        f"print(m.score({sample.prompt!r}, [{sample.response!r}])[0])"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(fresh.stdout) == pytest.approx(sample.reward, abs=1e-5)
    assert {path.name for path in output.iterdir()} >= {"metrics.json", "README.md", "learning_curve.jsonl"}
    assert not (output / "trainer").exists()


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path, make: Make) -> None:
    config = make(preset="margin")
    module, encoder = load_for_training(config.model.path, seed=0)
    splits = load_splits(config.data, encoder, PRESETS["margin"], 0)
    whole = MarginTrainer(module, splits.train.pairs, config, tmp_path / "steps", progress=False)
    whole.train()
    saved = sorted((tmp_path / "steps").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    again, _ = load_for_training(config.model.path, seed=0)
    resumed = MarginTrainer(again, splits.train.pairs, config, tmp_path / "steps2", progress=False)
    resumed.train(resume_from_checkpoint=str(saved[0]))
    assert int(saved[0].name.split("-")[1]) < whole.state.global_step
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, atol=1e-5, rtol=0)
    assert [entry["step"] for entry in resumed.history] == [entry["step"] for entry in whole.history]


def test_activation_checkpointing_recomputes_and_gives_the_same_gradients(tmp_path: Path, make: Make) -> None:
    config = make()
    gradients, calls = [], []
    for checkpointing in (False, True):
        module, encoder = load_for_training(config.model.path, seed=0)
        pairs = load_splits(config.data, encoder, PRESETS["margin"], 0).train.pairs[:16]
        changed = config.model_copy(
            update={"model": config.model.model_copy(update={"gradient_checkpointing": checkpointing})}
        )
        trainer = MarginTrainer(module, pairs, changed, tmp_path / "steps", progress=False)
        seen: list[int] = []
        hook = module.base.base_model.layers[0].attention.register_forward_pre_hook(
            lambda *_, seen=seen: seen.append(1)
        )
        module.train()
        trainer.compute_loss(module, trainer.data_collator(pairs)).backward()
        hook.remove()
        gradients.append([weight.grad for weight in module.parameters()])
        calls.append(len(seen))
    assert calls == [1, 2]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_steps_of_another_run_are_not_resumed(tmp_path: Path, make: Make) -> None:
    steps = tmp_path / "out" / "trainer"
    steps.mkdir(parents=True)
    (steps / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="--no-resume"):
        train(make())


def test_a_dry_run_trains_nothing(tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(make(), dry_run=True) is None
    assert "steps: 9 of 16 pairs" in capsys.readouterr().out
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_trap_a_reference_batch_too_small_stops_before_the_first_step(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"ema = 0\.9"):
        train(make(train_batch=4, pairs_per_step=4))


def test_an_edited_manifest_is_refused(tmp_path: Path, make: Make) -> None:
    train(make())
    path = tmp_path / "out" / "reward_manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9'), encoding="utf-8")
    with pytest.raises(ManifestError, match="schema_version"):
        Manifest.load(tmp_path / "out")
