"""Two processes over gloo on CPUs, started as people start them: they train what one process trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from marginrm_training.config import load_config
from marginrm_training.run import train
from support_models import tiny_checkpoint
from support_training import config_file

CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"
RUNS = [("bt", 64), ("bt", 70), ("margin", 64), ("margin", 70)]  # 70 pairs do not fill their last batch of 16
HALF = {"train_batch": 8}  # of each process; two of them make the same 16 pairs

# On every rank: trains each configuration, then its first step to resume from to the end again, and keeps what the rank
# has: the learning curve and all weights, once and again.
RANK = """
import json, sys
from pathlib import Path
import torch
from marginrm.loading import load_for_training
from marginrm_training.arguments import ranks
from marginrm_training.config import load_config
from marginrm_training.data import load_splits
from marginrm_training.trainer import MarginTrainer

assert ranks() == 2
for path in map(Path, sys.argv[1:]):
    config = load_config(path)
    steps = path.with_suffix(".steps")
    kept = []
    for start in (None, steps / "checkpoint-4"):
        module, encoder = load_for_training(config.model.path, seed=config.seed)
        pairs = load_splits(config.data, encoder, config.method.method(), config.seed).train.pairs
        trainer = MarginTrainer(module, pairs, config, steps, progress=False)
        trainer.train(resume_from_checkpoint=start and str(start))
        kept.append((trainer.history, module.state_dict()))
    torch.save(kept, path.with_suffix(f".rank{trainer.args.process_index}"))
"""


def launch(*command: str | Path) -> subprocess.CompletedProcess[str]:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp_cpu.yaml")]
    started = [*accelerate, "--main_process_port", "0", *map(str, command)]
    done = subprocess.run(started, capture_output=True, text=True, check=False, timeout=550)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    tiny_checkpoint(root / "base", "gpt_neox")
    return root


def curve(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "learning_curve.jsonl").read_text().splitlines()]


def assert_same_curve(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    assert [entry["step"] for entry in two] == [entry["step"] for entry in one]
    for entry, other in zip(one, two, strict=True):
        for name in ("loss", "bt_nll", "mu_B", "d_std", "fire_rate", "target_margin", "accuracy", "grad_norm"):
            assert other[name] == pytest.approx(entry[name], abs=1e-4), (entry["step"], name)


def test_two_processes_train_what_one_trains(folder: Path) -> None:
    alone, together = [], []
    for preset, pairs in RUNS:
        name, method = f"{preset}{pairs}", {"preset": preset}
        train(load_config(config_file(folder, pairs, name=name, method=method)))
        alone.append(curve(folder / name))
        halves: dict[str, Any] = {"learning_rate": 1e-2, "pairs_per_step": 16, "epochs": 2.0} | HALF
        together.append(config_file(folder, pairs, name=f"{name}-two", method=method, optim=halves))
    (folder / "rank.py").write_text(RANK, encoding="utf-8")
    launch(folder / "rank.py", *together)
    for (_, pairs), expected, path in zip(RUNS, alone, together, strict=True):
        (first, resumed), (_, again) = [torch.load(path.with_suffix(f".rank{rank}")) for rank in (0, 1)]
        assert len(expected) == 2 * (pairs // 16)
        assert_same_curve(expected, first[0])
        assert_same_curve(expected, resumed[0])
        for name, weight in first[1].items():
            torch.testing.assert_close(resumed[1][name], weight, atol=1e-5, rtol=0)
            assert torch.equal(again[1][name], resumed[1][name]), name  # the other rank's


def test_the_command_writes_one_checkpoint_and_says_what_it_leaves_out(folder: Path) -> None:
    single = config_file(folder, 70, name="command-one")
    train(load_config(single))
    marginrm = Path(sys.executable).with_name("marginrm")
    path = config_file(folder, 70, name="command-two")
    dry = launch("--no_python", marginrm, "train", path, "--set", "optim.train_batch=8", "--dry-run")
    assert dry.stdout.count("each epoch leaves out 6 training pairs") == 1
    assert "steps: 8 of 16 pairs, 8 a forward pass, 2 rank(s)" in dry.stdout
    done = launch("--no_python", marginrm, "train", path, "--set", "optim.train_batch=8")
    for line in ("each epoch leaves out 6 training pairs", "train: 70 pairs", "written to"):
        assert done.stdout.count(line) == 1
    assert_same_curve(curve(folder / "command-one"), curve(folder / "command-two"))
    assert sorted(path.name for path in (folder / "command-two").iterdir()) == sorted(
        path.name for path in (folder / "command-one").iterdir()
    )
