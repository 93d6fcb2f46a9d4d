"""Training runs of a tiny real model: data checks, overfitting, resuming, and a checkpoint that serves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from marginrm import RewardModel
from marginrm.errors import ConfigError, DataError, ManifestError
from marginrm.loading import load_for_training
from marginrm.manifest import Manifest
from marginrm_training.config import TrainConfig, parse_config
from marginrm_training.data.splits import encode_pairs, load_splits, read
from marginrm_training.evaluation.pairs import evaluate, score_pairs
from marginrm_training.method.margins import PRESETS
from marginrm_training.run.resume import resume_checkpoint
from marginrm_training.run.train import train, tune_for_training
from marginrm_training.run.trainer import MarginTrainer
from support.models import tiny_checkpoint
from support.training import rows, write

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
    tune_for_training(trainer, module)
    trainer.train()
    assert (score_pairs(RewardModel.from_module(module, encoder), pairs).d > 0).all()
    assert {"loss", "bt_nll", "accuracy", "d_mean", "d_std", "mu_B", "target_margin", "fire_rate", "grad_norm"} <= set(
        trainer.history[-1]
    )


def test_a_run_writes_a_checkpoint_that_serves_its_measured_rewards(tmp_path: Path, make: Make) -> None:
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


def test_a_killed_run_resumes_and_ends_where_the_uninterrupted_one_does(tmp_path: Path, make: Make) -> None:
    def command(output: str) -> list[str]:
        settings = make(output, epochs=12.0).model_dump(mode="json", exclude_none=True)
        settings["method"] |= {"preset": "margin", "estimator": "ema_mean"}
        path = tmp_path / f"{output}.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        code = (
            "import json, sys; from marginrm_training.config import parse_config; from marginrm_training.run.train import train\n"
            "train(parse_config(json.load(open(sys.argv[1])), 'test'))"
        )
        return [sys.executable, "-c", code, str(path)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    first = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps = tmp_path / "killed" / "trainer"
    while not any(steps.glob("checkpoint-*")):
        assert first.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    (steps / "checkpoint-99").mkdir()  # as a kill in the midst of saving leaves it

    again = subprocess.run(command("killed"), check=True, capture_output=True, text=True)

    assert "passed over" in again.stdout
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, atol=1e-5, rtol=0)
    curves = [
        [json.loads(line) for line in (tmp_path / name / "learning_curve.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    for entry, other in zip(*curves, strict=True):  # mu_B is the running mean: it survived
        assert (other["step"], other["mu_B"]) == (entry["step"], pytest.approx(entry["mu_B"], abs=1e-5))


def test_evaluations_during_training_measure_held_out_pairs_and_leave_training_unchanged(
    tmp_path: Path, make: Make
) -> None:
    config = make("watched").model_copy(update={"log_every": 2, "eval_every": 4})
    train(config)
    train(make("unwatched"))
    watched, unwatched = (load_file(tmp_path / name / "model.safetensors") for name in ("watched", "unwatched"))
    assert all(torch.equal(watched[name], weight) for name, weight in unwatched.items())

    curve = [json.loads(line) for line in (tmp_path / "watched" / "learning_curve.jsonl").read_text().splitlines()]
    evaluated = [entry for entry in curve if "eval_bt_nll" in entry]
    assert [entry["step"] for entry in evaluated] == [4, 8, 9]  # the last step too
    assert [entry["step"] for entry in curve if "fire_rate" in entry] == [2, 4, 6, 8]
    model = RewardModel.from_pretrained(tmp_path / "watched", dtype="float32")
    pairs = load_splits(config.data, model.encoder, config.method.method(), config.seed).calibration.pairs
    found = evaluate(score_pairs(model, pairs), pairs, 1.0)
    for name in ("bt_nll", "accuracy"):
        assert curve[-1][f"eval_{name}"] == pytest.approx(found[name], abs=1e-5)


def test_evaluate_measures_other_pairs(tmp_path: Path, make: Make) -> None:
    config = make()
    module, encoder = load_for_training(config.model.path, seed=0)
    pairs = load_splits(config.data, encoder, config.method.method(), config.seed).train.pairs
    trainer = MarginTrainer(module, pairs, config, tmp_path / "steps", held_out=pairs[:1], progress=False)
    other = pairs[1:4]
    found = evaluate(score_pairs(RewardModel.from_module(module, encoder), other), other, 1.0)
    measured = trainer.evaluate(other, metric_key_prefix="other")
    for name in ("bt_nll", "accuracy"):
        assert measured[f"other_{name}"] == pytest.approx(found[name], abs=1e-5)


def test_an_evaluation_of_no_pairs_is_refused(tmp_path: Path, make: Make) -> None:
    config = make().model_copy(update={"eval_every": 4})
    module, encoder = load_for_training(config.model.path, seed=0)
    pairs = load_splits(config.data, encoder, config.method.method(), config.seed).train.pairs
    with pytest.raises(ConfigError, match=r"eval_every = 4.*no held-out pairs"):
        MarginTrainer(module, pairs, config, tmp_path / "steps", progress=False)


def test_a_run_resumes_under_a_version_with_new_settings(tmp_path: Path, make: Make) -> None:
    config = make()
    resume_checkpoint(config, tmp_path / "steps", resume=True)
    note = tmp_path / "steps" / "run.json"
    old = json.loads(note.read_text())
    del old["eval_every"], old["model"]["head_std"]
    note.write_text(json.dumps(old))
    assert resume_checkpoint(config, tmp_path / "steps", resume=True) is None
    note.write_text(json.dumps(old | {"a_setting": "that is gone"}))
    with pytest.raises(ConfigError, match="other settings"):
        resume_checkpoint(config, tmp_path / "steps", resume=True)


def test_no_resume_removes_the_saved_steps(tmp_path: Path, make: Make) -> None:
    steps = tmp_path / "steps"
    config = make()
    assert resume_checkpoint(config, steps, resume=True) is None
    saved = steps / "checkpoint-4"
    saved.mkdir()
    (saved / "trainer_state.json").write_text("{}", encoding="utf-8")
    (saved / "margin_state.json").write_text("{}", encoding="utf-8")
    assert resume_checkpoint(config, steps, resume=True) == str(saved)
    assert resume_checkpoint(make(preset="bt"), steps, resume=False) is None
    assert not saved.exists()
    with pytest.raises(ConfigError, match="other settings"):
        resume_checkpoint(config, steps, resume=True)


@pytest.mark.parametrize(
    ("preset", "setting", "value"),
    [
        ("bt", "cap", 1.0),
        ("bt", "scale", 2.0),
        ("margin", "fixed", 1.0),
        ("margin_unfiltered", "threshold_std", 0.5),
        ("column", "ema", 0.9),
        ("scaled_bt", "label_smoothing", 0.1),
        ("soft_label", "warmup_ratio", 0.1),
    ],
)
def test_a_setting_without_effect_is_refused(make: Make, preset: str, setting: str, value: float) -> None:
    settings = make().model_dump(mode="json", exclude_none=True)
    settings["method"] = {"preset": preset, setting: value}
    with pytest.raises(ConfigError, match=f"method.{setting}: no effect"):
        parse_config(settings, "test")


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


def test_leftover_pairs_are_counted(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    settings = make().model_dump(mode="json", exclude_none=True)
    settings["data"]["limit"] = 47
    train(parse_config(settings, "test"), dry_run=True)
    told = capsys.readouterr().out
    assert "each epoch leaves out 15 training pairs" in told
    assert "steps: 6 of 16 pairs" in told
    settings["data"]["limit"] = 15
    with pytest.raises(ConfigError, match="There are 15 training pairs, and one forward pass takes"):
        train(parse_config(settings, "test"))


def test_a_run_with_candidates_reports_best_of_n(tmp_path: Path, make: Make) -> None:
    texts = ["Red, yellow and blue.", "No.", "Paris is the capital.", "I do not know."]
    candidates = [{"text": text, "quality": float(index % 2 == 0)} for index, text in enumerate(texts)]
    groups = write(tmp_path / "groups.jsonl", [{"prompt": f"Task {n}?", "candidates": candidates} for n in range(3)])
    settings = make().model_dump(mode="json", exclude_none=True)
    settings["data"]["best_of_n"] = str(groups)
    train(parse_config(settings, "test"))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Best-of-N</h2>" in page
    assert "The curve ends at N = 4" in page
    groups.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"groups\.jsonl: has no group of candidates"):
        train(parse_config(settings | {"output": str(tmp_path / "none")}, "test"))


def test_trap_a_reference_batch_too_small_stops_before_the_first_step(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"ema = 0\.9"):
        train(make(train_batch=4, pairs_per_step=4))


def test_an_edited_manifest_is_refused(tmp_path: Path, make: Make) -> None:
    train(make())
    path = tmp_path / "out" / "reward_manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9'), encoding="utf-8")
    with pytest.raises(ManifestError, match="schema_version"):
        Manifest.load(tmp_path / "out")
