"""Layer-wise decay: the first step of AdamW moves a weight by its learning rate, so displacements tell the rates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from marginrm.errors import ConfigError
from marginrm.loading import load_for_training
from marginrm_training.config import parse_config
from marginrm_training.data.splits import encode_pairs, read
from marginrm_training.run.layer_decay import with_layer_rates
from marginrm_training.run.trainer import MarginTrainer
from support.models import tiny_checkpoint
from support.training import rows, write


def displacements(folder: Path, start: Path, data: Path, decay: float) -> tuple[dict[str, Tensor], float]:
    """Returns how far each weight moves in the first step of the full learning rate, and the logged learning rate."""
    config = parse_config(
        {
            "output": str(folder),
            "log_every": 1,
            "model": {"path": str(start)},
            "data": {"train": str(data)},
            "optim": {
                "learning_rate": 1e-3,
                "pairs_per_step": 16,
                "train_batch": 16,
                "warmup_ratio": 0.0,
                "clip": 1e9,
                "layer_decay": decay,
            },
        },
        "test",
    )
    module, encoder = load_for_training(config.model.path, seed=0)
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    pairs = encode_pairs("train", read(str(data)), encoder, config.method.method()).pairs
    trainer = MarginTrainer(module, pairs, config, folder / "steps", progress=False)
    trainer.train()
    moved = {name: weight.detach() - before[name] for name, weight in module.named_parameters()}
    return moved, trainer.history[0]["learning_rate"]


@pytest.mark.parametrize(("family", "layers", "head"), [("llama", "layers", "score"), ("bert", "layer", "classifier")])
def test_lower_layers_take_smaller_steps(tmp_path: Path, family: str, layers: str, head: str) -> None:
    start = tiny_checkpoint(tmp_path / "base", family)
    data = write(tmp_path / "pairs.jsonl", rows(16))
    plain, plain_rate = displacements(tmp_path / "plain", start, data, 1.0)
    decayed, rate = displacements(tmp_path / "decayed", start, data, 0.5)
    ratios = {
        name: float(decayed[name].norm() / plain[name].norm()) for name in plain if float(plain[name].norm()) > 1e-6
    }
    number = 1 + max(int(name.split(f".{layers}.")[1].split(".")[0]) for name in ratios if f".{layers}." in name)
    expected = {}
    for name in ratios:
        if f".{layers}." in name:
            expected[name] = 0.5 ** (number - 1 - int(name.split(f".{layers}.")[1].split(".")[0]))
        else:
            expected[name] = 0.5**number if "embed" in name else 1.0
    assert ratios == pytest.approx(expected, rel=1e-3)
    assert {0.5**number, 1.0} <= set(expected.values())
    assert any(head in name for name in ratios)
    assert rate == pytest.approx(plain_rate)  # logs show the learning rate of the head


def test_sharded_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="sharded"):
        with_layer_rates([{"params": [torch.zeros(1)], "lr": 1.0}], {})
