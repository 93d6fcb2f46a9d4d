"""The step planner: everything is covered once, and no forward pass computes more than the budget, padding included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from marginrm.encoding import EncodedResponse
from marginrm.packing import cost, shared_prefix
from marginrm.reward_model import RewardModel
from marginrm.steps import GroupSlice, plan_steps
from support.models import tiny_checkpoint

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=7)
groups = st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=5)


def covered(steps: list[list[GroupSlice]]) -> list[tuple[int, int]]:
    return [(part.group, index) for step in steps for part in step for index in range(part.start, part.stop)]


def places(batch: list[list[list[int]]]) -> list[tuple[int, int]]:
    return [(number, index) for number, group in enumerate(batch) for index in range(len(group))]


@given(groups, st.integers(1, 30), st.booleans())
def test_packed_steps_cover_everything_in_order_within_the_budget(
    batch: list[list[list[int]]], budget: int, share: bool
) -> None:
    steps = list(plan_steps(batch, budget, path="packed", share_prefix=share))
    assert covered(steps) == places(batch)
    for step in steps:
        assert all(part.start < part.stop for part in step)
        spent = sum(cost(batch[part.group][part.start : part.stop], share_prefix=share) for part in step)
        alone = len(step) == 1 and step[0].stop - step[0].start == 1
        first = batch[step[0].group]
        cut = cost(first, share_prefix=share) > budget
        shared = shared_prefix(first) if share and cut else 0
        assert spent <= shared + max(budget + min(budget // 8, shared), shared) or alone


@given(groups, st.integers(1, 30))
def test_padded_steps_hold_each_response_once_within_the_budget_padding_included(
    batch: list[list[list[int]]], budget: int
) -> None:
    steps = list(plan_steps(batch, budget, path="padded", share_prefix=False))
    assert sorted(covered(steps)) == places(batch)
    for step in steps:
        lengths = [len(batch[number][index]) for number, index in covered([step])]
        assert max(lengths) * len(lengths) <= budget or len(lengths) == 1


def test_padded_steps_put_like_lengths_together_longest_first() -> None:
    batch = [[[0] * 2, [0] * 20], [[0] * 2, [0] * 19], [[0] * 3]]
    steps = list(plan_steps(batch, 40, path="padded", share_prefix=False))
    assert [covered([step]) for step in steps] == [[(0, 1), (1, 1)], [(2, 0), (0, 0), (1, 0)]]


def test_a_group_over_the_budget_is_split_and_its_prefix_computed_once_for_a_budget_of_the_rest() -> None:
    group = [[9] * 10 + [index] for index in range(30)]
    steps = list(plan_steps([group], 13, path="packed", share_prefix=True))
    assert [(part.start, part.stop) for step in steps for part in step] == [(0, 14), (14, 28), (28, 30)]


@pytest.mark.parametrize("tokens", [128, 129, 140])  # 129: 32 of them are just over a budget
def test_64_candidates_on_a_long_prompt_cost_one_prompt_and_their_own_tokens_within_a_tenth(tokens: int) -> None:
    group = [tuple(range(800)) + (1_000 + index,) * tokens for index in range(64)]
    steps = list(plan_steps([group], 4096, path="packed", share_prefix=True))
    spent = sum(cost(group[part.start : part.stop], share_prefix=True) for step in steps for part in step)
    assert spent <= 1.1 * (800 + 64 * tokens)


@pytest.mark.parametrize("path", ["packed", "padded"])
def test_no_groups_make_no_steps(path: str) -> None:
    assert list(plan_steps([], 10, path=path, share_prefix=False)) == []


def test_a_padded_model_never_computes_more_tokens_than_its_budget(tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(tiny_checkpoint(tmp_path, "llama"), dtype="float32", token_budget=1024)
    model.module.forward_path = "padded"
    computed: list[int] = []
    model.module.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].ids.numel()))
    groups = [[EncodedResponse(tuple(range(5, 10)))] for _ in range(100)]
    groups.insert(40, [EncodedResponse(tuple(5 + index % 90 for index in range(500)))])
    rewards = model.score_encoded(groups)
    assert max(computed) <= 1024
    assert sum(computed) < 2 * (100 * 5 + 500)
    alone = model.score_encoded(groups[40:42])
    torch.testing.assert_close(torch.tensor(rewards[40:42]), torch.tensor(alone), atol=1e-5, rtol=0)


def test_a_padded_step_counts_the_padding_of_each_group(tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(tiny_checkpoint(tmp_path, "llama"), dtype="float32", token_budget=40)
    model.module.forward_path = "padded"
    sizes = [[2, 20], [2, 19], [3]]
    groups = [[EncodedResponse(tuple(range(5, 5 + size))) for size in group] for group in sizes]
    result = model.run_step(groups)
    assert result.computed == [20 + 3, 20 + 3, 3]
    assert result.rewards == [pytest.approx(rewards, abs=1e-5) for rewards in model.score_encoded(groups)]


def test_a_module_in_training_stays_in_training_and_is_scored_in_evaluation_mode(tmp_path: Path) -> None:
    loaded = RewardModel.from_pretrained(tiny_checkpoint(tmp_path, "llama"), dtype="float32")
    group = [EncodedResponse(tuple(range(5, 15)))]
    expected = loaded.score_encoded([group])
    frozen = nn.Dropout(0.5).eval()  # evaluation mode on purpose, inside a module in training
    loaded.module.train().add_module("frozen", frozen)
    model = RewardModel.from_module(loaded.module, loaded.encoder)
    assert model.module.training
    modes: list[bool] = []
    model.module.backbone.register_forward_pre_hook(lambda part, _: modes.append(part.training))
    assert model.score_encoded([group]) == expected
    assert modes == [False]
    assert model.module.training
    assert model.module.backbone.training
    assert not frozen.training
