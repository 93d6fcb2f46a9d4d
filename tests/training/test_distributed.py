"""Two processes over gloo on CPUs, started by `accelerate launch`: they train as one process does."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from marginrm import RewardModel
from marginrm.errors import ConfigError
from marginrm_training.ablation.cli import ablate
from marginrm_training.config import load_config
from marginrm_training.run.distributed import check_sharding
from marginrm_training.run.train import train
from support.models import tiny_checkpoint
from support.training import config_file

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
# 70 pairs do not fill their last batch of 16.
RUNS = [("bt", 64), ("bt", 70), ("margin", 64), ("margin", 70), ("aplot", 70)]
# Of each process; two of them make the same 16 pairs a forward pass.
TWO: dict[str, Any] = {"learning_rate": 1e-2, "pairs_per_step": 16, "epochs": 2.0, "train_batch": 8}

run_file = partial(config_file, eval_every=4)

# On every rank: trains each configuration, then its first step to resume from to the end again, and keeps what the rank
# has: the learning curve and all weights, once and again.
RANK = """
import json, sys
from functools import partial
from pathlib import Path
import torch
from marginrm.loading import load_for_training
from marginrm_training.run.distributed import ranks, shut_down_process_group
from marginrm_training.config import load_config
from marginrm_training.data.splits import load_splits
from marginrm_training.run.train import tune_for_training
from marginrm_training.run.trainer import MarginTrainer

assert ranks() == 2
for path in map(Path, sys.argv[1:]):
    config = load_config(path)
    steps = path.with_suffix(".steps")
    kept = []
    for start in (None, steps / "checkpoint-4"):
        module, encoder = load_for_training(config.model.path, seed=config.seed)
        splits = load_splits(config.data, encoder, config.method.method(), config.seed)
        held_out = splits.calibration.pairs
        trainer = MarginTrainer(module, splits.train.pairs, config, steps, held_out=held_out, progress=False)
        tune_for_training(trainer, module)
        trainer.train(resume_from_checkpoint=start and str(start))
        kept.append((trainer.history, module.state_dict()))
    torch.save(kept, path.with_suffix(f".rank{trainer.args.process_index}"))
shut_down_process_group(trainer)
"""


# As the command, but accelerate is told that these CPUs are GPUs: it shards on nothing else, although torch does.
SHARDED = """
import sys
from functools import partial
from pathlib import Path
from accelerate import PartialState
from accelerate.utils import DistributedType
from marginrm_training.run import train
from marginrm_training.config import load_config
from marginrm_training.run.trainer import MarginTrainer

class Sharding(MarginTrainer):
    def create_accelerator_and_postprocess(self):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def train(self, **options):
        super().train(**options)
        parts = [weight.to_local().numel() for weight in self.model_wrapped.parameters()]
        whole = sum(weight.numel() for weight in self.model_wrapped.parameters())
        print(f"rank {self.args.process_index} holds {sum(parts) / whole:.2f}")

train.MarginTrainer = Sharding
train.train(load_config(Path(sys.argv[1])))
"""


def launch(*command: str | Path, config: Path = CONFIGS / "ddp_cpu.yaml") -> subprocess.CompletedProcess[str]:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    started = [*accelerate, "--main_process_port", "0", *map(str, command)]
    return subprocess.run(started, capture_output=True, text=True, check=False, timeout=550)


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
        for name in {"style_log_length", "style_lists"} & entry.keys():
            assert other[name] == pytest.approx(entry[name], abs=1e-4), (entry["step"], name)
        assert ("eval_bt_nll" in entry) == (entry["step"] % 4 == 0 or entry is one[-1])
        for name in {"eval_bt_nll", "eval_accuracy"} & entry.keys():
            assert other[name] == pytest.approx(entry[name], abs=1e-4), (entry["step"], name)


def test_two_processes_train_as_one_does(folder: Path) -> None:
    alone, together = [], []
    method: dict[str, Any]
    for preset, pairs in RUNS:
        name, method = f"{preset}{pairs}", {"preset": preset}
        if preset == "aplot":
            method["style_control"] = True
        train(load_config(run_file(folder, pairs, name=name, method=method)))
        alone.append(curve(folder / name))
        together.append(run_file(folder, pairs, name=f"{name}-two", method=method, optim=TWO))
    (folder / "rank.py").write_text(RANK, encoding="utf-8")
    done = launch(folder / "rank.py", *together)
    assert done.returncode == 0, done.stderr
    for (_, pairs), expected, path in zip(RUNS, alone, together, strict=True):
        (first, resumed), (_, again) = [torch.load(path.with_suffix(f".rank{rank}")) for rank in (0, 1)]
        assert len(expected) == 2 * (pairs // 16)
        assert_same_curve(expected, first[0])
        assert_same_curve(expected, resumed[0])
        for name, weight in first[1].items():
            torch.testing.assert_close(resumed[1][name], weight, atol=1e-5, rtol=0)
            assert torch.equal(again[1][name], resumed[1][name]), name  # the other rank's


def test_the_command_writes_one_checkpoint_and_counts_leftover_pairs(folder: Path) -> None:
    train(load_config(run_file(folder, 70, name="command-one")))
    path = run_file(folder, 70, name="command-two")
    marginrm = Path(sys.executable).with_name("marginrm")
    command = ["--no_python", marginrm, "train", path, "--set", "optim.train_batch=8"]
    planned = launch(*command, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.count("steps: 8 of 16 pairs, 8 a forward pass, 2 rank(s)") == 1
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    for line in ("each epoch leaves out 6 training pairs", "train: 70 pairs", "written to"):
        assert done.stdout.count(line) == 1
    assert_same_curve(curve(folder / "command-one"), curve(folder / "command-two"))
    assert files(folder / "command-two") == files(folder / "command-one")


def files(output: Path) -> list[str]:
    return sorted(str(path.relative_to(output)) for path in output.rglob("*"))


def test_sharded_weights_train_alike_and_are_gathered_for_the_checkpoint(folder: Path) -> None:
    train(load_config(run_file(folder, 70, name="whole")))
    path = run_file(folder, 70, name="sharded", optim=TWO)
    shards = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text(encoding="utf-8")) | {"use_cpu": True}
    (folder / "fsdp.yaml").write_text(yaml.safe_dump(shards), encoding="utf-8")
    (folder / "sharded.py").write_text(SHARDED, encoding="utf-8")
    done = launch(folder / "sharded.py", path, config=folder / "fsdp.yaml")
    assert done.returncode == 0, done.stderr
    assert "rank 0 holds 0.5" in done.stdout
    assert_same_curve(curve(folder / "whole"), curve(folder / "sharded"))
    # Rewards, not weights: Adam blows up the rounding of the key's bias, whose gradient is 0 in truth.
    rewards = [
        [sample["reward"] for sample in json.loads((folder / name / "reward_manifest.json").read_text())["golden"]]
        for name in ("whole", "sharded")
    ]
    assert rewards[1] == pytest.approx(rewards[0], abs=1e-3)
    assert RewardModel.from_pretrained(folder / "sharded", dtype="float32").verify_golden() is not None


def test_fsdp_on_cpus_is_refused() -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACCELERATE_USE_FSDP", "true")
        check_sharding(sharded=True)
        with pytest.raises(ConfigError, match=r"on CPUs it shards nothing.*ddp_cpu\.yaml"):
            check_sharding(sharded=False)
    check_sharding(sharded=False)


def test_an_ablation_under_a_launcher_is_refused(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="starts its own processes"):
            ablate(tmp_path / "any.toml")


@pytest.mark.parametrize("name", ["ddp_cpu", "fsdp", "deepspeed_zero2"])
def test_the_example_configurations_are_accelerates(name: str) -> None:
    config: Any = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # a key that it does not know is an error
    assert (config.num_processes, config.mixed_precision) == (2, "no")
    options = {option for action in launch_command_parser()._actions for option in action.option_strings}
    for key in (config.fsdp_config or {}) | (config.deepspeed_config or {}):
        assert f"--{key}" in options
