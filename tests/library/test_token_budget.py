"""The token budget that is measured, and what it is measured with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from marginrm import RewardModel
from marginrm.packing import plan_row
from marginrm.tuning.timing import trial_groups
from marginrm.tuning.token_budget import choose_token_budget
from support.models import tiny_checkpoint


def out_of_memory_at(limit: int, error: type[RuntimeError] = torch.OutOfMemoryError) -> Callable[[int], float]:
    def seconds(tokens: int) -> float:
        if tokens >= limit:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return 1e-3 / tokens  # larger is always better

    return seconds


@pytest.mark.parametrize(
    ("seconds", "budget"),
    [
        (lambda tokens: tokens * 1e-5, 4096),  # nothing gets cheaper: the usual one
        (lambda tokens: 0.01 + tokens * 1e-7, 16384),  # mostly overhead: as large as is tried
        (lambda tokens: 0.041 + tokens * 1e-5, 8192),
        (lambda tokens: tokens * 5e-3, 2048),  # 4,096 tokens would take 20 s
        (lambda tokens: tokens * 1e-1, 1024),  # nothing is quick enough: the smallest
        (out_of_memory_at(4096), 2048),
        (out_of_memory_at(4096, RuntimeError), 2048),  # as CPUs say it
    ],
)
def test_the_budget_grows_as_long_as_it_pays(seconds: Callable[[int], float], budget: int) -> None:
    assert choose_token_budget(seconds, 4096) == budget


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_model_s_budget_is_measured(tmp_path: Path, family: str) -> None:
    model = RewardModel.from_pretrained(tiny_checkpoint(tmp_path / "model", family))
    assert model.measure_token_budget() == model.token_budget
    assert model.token_budget in (1024, 2048, 4096, 8192, 16384)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_trial_groups_have_their_size_and_share_nothing(tmp_path: Path, family: str) -> None:
    model = RewardModel.from_pretrained(tiny_checkpoint(tmp_path / "model", family))
    groups = trial_groups(model.encoder, 4096)
    length = len(groups[0][0].ids)
    assert 4096 - length < sum(len(one.ids) for (one,) in groups) <= 4096
    plan = plan_row([[one.ids for one in group] for group in groups], causal=True)
    assert len(plan.ids) == sum(len(one.ids) for (one,) in groups)
    if family == "bert":
        assert all(one.type_ids is not None and len(one.type_ids) == length for (one,) in groups)


def test_long_steps_are_extrapolated_from_two_sizes() -> None:
    tried: list[int] = []

    def seconds(tokens: int) -> float:
        tried.append(tokens)
        return 0.1 + tokens * 5e-4

    assert choose_token_budget(seconds, 4096) == 4096
    assert tried == [1024, 2048]


def test_other_errors_of_the_trial_are_raised() -> None:
    def seconds(tokens: int) -> float:
        if tokens > 1024:
            raise RuntimeError("another")
        return 1e-3

    with pytest.raises(RuntimeError, match="another"):
        choose_token_budget(seconds, 4096)
