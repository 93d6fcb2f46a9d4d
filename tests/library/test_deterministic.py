"""Deterministic mode is batch-invariant: a text has one reward, to the bit, whatever is scored beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marginrm import RewardModel
from marginrm.attention.blocked import BLOCK, BlockLayout
from marginrm.encoding import EncodedResponse
from marginrm.errors import ConfigError, ModelError
from marginrm.forward.batch import PackedBatch, pad
from marginrm.loading import load_for_scoring
from marginrm.tuning.deterministic import TILE
from marginrm.tuning.tune import tune
from support.models import FAMILIES, SENTENCES, tiny_checkpoint

WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"kv_heads": 2, "sliding_window": 50},
    "modernbert": {"local_attention": 8},
    "qwen3": {"kv_heads": 2},
}


def deterministic(path: Path, family: str, dtype: str = "float32", **options: Any) -> RewardModel:
    checkpoint = tiny_checkpoint(path / family, family, **WINDOWED.get(family, {}))
    return RewardModel.from_pretrained(checkpoint, dtype=dtype, deterministic=True, **options)  # type: ignore[arg-type]


def rewards_of(model: RewardModel, groups: list[list[EncodedResponse]]) -> list[float]:
    return [reward for rewards in model.run_step(groups).rewards for reward in rewards]


def groups_of(model: RewardModel, lengths: list[tuple[int, list[int]]], seed: int) -> list[list[EncodedResponse]]:
    """Groups of random tokens: lengths of the common start and of what follows it."""
    generator = random.Random(seed)
    vocabulary = model.module.base.config.vocab_size

    def some(count: int) -> tuple[int, ...]:
        return tuple(generator.choices(range(5, vocabulary), k=count))

    def response(ids: tuple[int, ...]) -> EncodedResponse:
        typed = model.module.base.config.model_type == "bert"
        return EncodedResponse(ids, tuple(int(i > len(ids) // 2) for i in range(len(ids))) if typed else None)

    return [[response(start + some(own)) for own in owns] for shared, owns in lengths for start in [some(shared)]]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_give_the_rewards_of_padded_rows(tmp_path: Path, family: str) -> None:
    model = deterministic(tmp_path, family)
    groups = groups_of(model, [(140, [3, 70, 150]), (0, [1, BLOCK, BLOCK + 1]), (2 * BLOCK, [1, BLOCK])], 0)
    row = model.module.collate(groups)
    assert isinstance(row, PackedBatch)
    assert isinstance(row.layout, BlockLayout)
    with torch.inference_mode():
        expected = model.module(pad(groups, pad_token_id=0)).tolist()
    assert rewards_of(model, groups) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "mistral", "bert", "modernbert"])
def test_a_reward_has_the_same_bits_in_any_batch(tmp_path: Path, family: str, dtype: str) -> None:
    model = deterministic(tmp_path, family, dtype)
    part = st.tuples(st.integers(0, 150), st.lists(st.integers(1, 300), min_size=1, max_size=4))

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(part, min_size=1, max_size=5), st.integers(0, 1_000), st.randoms(use_true_random=False))
    def holds(lengths: list[tuple[int, list[int]]], seed: int, order: random.Random) -> None:
        groups = groups_of(model, lengths, seed)
        alone = {response: rewards_of(model, [[response]])[0] for group in groups for response in group}
        order.shuffle(groups)
        for group in groups:
            order.shuffle(group)
        together = [response for group in groups for response in group]
        assert rewards_of(model, groups) == [alone[response] for response in together]
        cut = order.randrange(1, len(groups) + 1)
        assert rewards_of(model, groups[:cut]) == [alone[one] for group in groups[:cut] for one in group]

    holds()


def test_without_it_the_bits_do_depend_on_the_batch(tmp_path: Path) -> None:
    """Or the tests above could not fail."""
    checkpoint = tiny_checkpoint(tmp_path / "model", "qwen3", kv_heads=2)
    model = RewardModel.from_pretrained(checkpoint, dtype="bfloat16")
    groups = groups_of(model, [(140, [3, 70, 150]), (0, [300, 200])], 0)
    together = rewards_of(model, groups)
    assert together != [rewards_of(model, [[response]])[0] for group in groups for response in group]


def test_steps_of_any_size_give_the_same_bits(tmp_path: Path) -> None:
    one, other = (deterministic(tmp_path / str(budget), "qwen3", token_budget=budget) for budget in (64, 4096))
    texts = [f"{sentence} {sentence}" for sentence in SENTENCES]
    assert one.score("Which of these is true?", texts) == other.score("Which of these is true?", texts)


def test_rows_are_whole_tiles(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", "llama", max_length=100)
    model = RewardModel.from_pretrained(checkpoint, deterministic=True)
    for count in (1, 99):  # a filler is longer than a sequence may be
        row = model.module.collate(groups_of(model, [(0, [count])], 0))
        assert row.ids.shape[1] == TILE


def test_a_model_that_stays_batch_dependent_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", "qwen3")
    with pytest.raises(ConfigError, match="exclude each other"):
        RewardModel.from_pretrained(checkpoint, compiled=True, deterministic=True)
    module, *_ = load_for_scoring(checkpoint, purpose=None)

    def with_neighbours(_module: object, _inputs: object, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 1e-3 * hidden.mean(dim=1, keepdim=True)

    module.base.get_input_embeddings().register_forward_hook(with_neighbours)
    with pytest.raises(ModelError, match=r"still differs by .* with its neighbours in a probe on \d+ threads"):
        tune(module, "deterministic_scoring")
    assert module.execution.attention == "gathered"
    assert module.execution.tile is None


def test_a_reward_that_becomes_nan_with_its_neighbours_is_refused(tmp_path: Path) -> None:
    module, *_ = load_for_scoring(tiny_checkpoint(tmp_path / "model", "qwen3"), purpose=None)

    def with_neighbours(_module: object, _inputs: object, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if hidden.shape[1] <= TILE else hidden * torch.nan

    module.base.get_input_embeddings().register_forward_hook(with_neighbours)
    with pytest.raises(ModelError, match="still differs by nan"):
        tune(module, "deterministic_scoring")


def test_a_model_on_padded_rows_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", "mistral", sliding_window=50)
    module, *_ = load_for_scoring(checkpoint, purpose=None)
    module.forward_path = "padded"
    with pytest.raises(ModelError, match="cannot be packed"):
        tune(module, "deterministic_scoring")
