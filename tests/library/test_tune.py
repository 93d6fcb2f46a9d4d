"""One execution a module: which combinations are legal, and what tuning for each purpose gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from marginrm.forward.execution import Execution
from marginrm.loading import load_for_scoring, load_for_training
from marginrm.tuning.deterministic import TILE
from marginrm.tuning.tune import tune
from support.forward import groups_of
from support.models import tiny_checkpoint


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"device": "cuda", "attention": "matmul"}, "matmul and AMX attention are for CPUs"),
        ({"device": "cuda", "weights": "packed"}, "packed weights are for CPUs"),
        ({"device": "cuda", "splits_prefix": True}, "splits prefixes"),
        ({"attention": "flex", "splits_prefix": True}, "splits prefixes"),
        ({"attention": "blocked"}, "blocked attention needs tiles"),
        ({"tile": TILE}, "blocked attention needs tiles"),
        ({"attention": "blocked", "tile": TILE, "compiled": True}, "no other optimisation"),
        ({"attention": "blocked", "tile": TILE, "weights": "packed"}, "no other optimisation"),
        ({"attention": "blocked", "tile": TILE, "last_layer": "reward_tokens"}, "no other optimisation"),
    ],
)
def test_an_illegal_combination_is_refused_by_its_rule(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Execution(**fields)


def test_a_module_that_is_not_tuned_computes_plainly(tmp_path: Path) -> None:
    module, *_ = load_for_scoring(tiny_checkpoint(tmp_path, "llama"), dtype="float32", device="cpu", purpose=None)
    assert module.execution == Execution(device="cpu")
    assert module.forward_reason == "packed rows reproduce the model's own forward (prefixes shared)"


def test_the_purpose_decides_and_a_module_may_be_tuned_again(tmp_path: Path) -> None:
    module, _ = load_for_training(tiny_checkpoint(tmp_path, "llama"), seed=0)
    groups = groups_of(module.base.config.vocab_size)
    with torch.inference_mode():
        expected = module(module.collate(groups))
    found = {}
    for purpose in ("training", "deterministic_scoring", "training", "scoring"):
        assert tune(module, purpose) is module.execution
        found[purpose] = module.execution
        with torch.inference_mode():
            torch.testing.assert_close(module(module.collate(groups)), expected, atol=1e-5, rtol=0)
    assert found["training"].attention == "gathered"
    assert found["training"].splits_prefix
    assert found["training"].last_layer == "reward_tokens"
    assert found["training"].weights == "plain"
    assert (found["deterministic_scoring"].attention, found["deterministic_scoring"].tile) == ("blocked", TILE)
    assert found["scoring"].last_layer == "reward_tokens"


def test_dropout_in_training_keeps_prefixes_with_their_sequences(tmp_path: Path) -> None:
    module, *_ = load_for_scoring(
        tiny_checkpoint(tmp_path, "llama", attention_dropout=0.1), dtype="float32", device="cpu"
    )
    assert module.execution.splits_prefix
    training, *_ = load_for_scoring(tmp_path, dtype="float32", device="cpu", purpose=None)
    assert not tune(training.train(), "training").splits_prefix
    prompt = tuple(5 + index % 90 for index in range(150))
    one = groups_of(300)[0][0]
    groups = [[type(one)((*prompt, *range(start, start + 9))) for start in (9, 60)]]
    training(training.collate(groups)).sum().backward()
