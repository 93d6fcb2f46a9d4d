"""FlexAttention over packed rows: its mask against what a plan says, its rewards against those of the other paths."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from marginrm.attention.flex import IntervalLayout, interval_layout
from marginrm.attention.gathered import GatheredLayout
from marginrm.attention.layout import AttentionOptions, UnsupportedAttentionError
from marginrm.encoding import EncodedResponse
from marginrm.forward.batch import PackedBatch, pad
from marginrm.forward.eligibility import build_module
from marginrm.forward.execution import Execution
from marginrm.forward.module import RewardModule
from marginrm.packing import PackingPlan, plan_row
from marginrm.tuning import attention, last_layer
from marginrm.tuning.tune import tune
from support.models import tiny_checkpoint

# torch's own: as it imports its compiler, and as that looks at tensors with gradients (it hides the second itself).
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)
compiles = pytest.mark.skipif(
    shutil.which("g++") is None or not torch.cpu._is_avx2_supported(),
    reason="FlexAttention is compiled by g++ on CPUs, and for AVX2 only",
)

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=7)
forests = st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=6)
windows = st.none() | st.integers(1, 6)


def brute_force(plan: PackingPlan, window: int | None, *, causal: bool) -> torch.Tensor:
    """Which row index sees which, [tokens, tokens]: by reading every response's sequence off the plan."""
    seen = torch.zeros(len(plan.ids), len(plan.ids), dtype=torch.bool)
    for leaf in plan.leaves:
        runs = [plan.runs[index] for index in (*plan.ancestors(leaf), leaf)]
        sequence = [index for run in runs for index in range(run.start, run.start + run.length)]
        for at, q in enumerate(sequence):
            for other, k in enumerate(sequence):
                seen[q, k] |= (other <= at or not causal) and (window is None or abs(at - other) < window)
    return seen


def dense(layout: IntervalLayout, window: int | None) -> torch.Tensor:
    places = torch.arange(len(layout.start))
    zero = torch.zeros(1, dtype=torch.int32)
    return layout.mask_function(window)(zero, zero, places[:, None], places[None, :])


@given(forests, st.booleans(), st.integers(1, 3), windows)
def test_the_intervals_are_what_each_token_sees(
    batch: list[list[list[int]]], causal: bool, share_from: int, window: int | None
) -> None:
    plan = plan_row(batch, causal=causal, share_from=share_from)
    layout = interval_layout(plan)
    assert torch.equal(dense(layout, window), brute_force(plan, window, causal=causal))


def stretched(batch: list[list[list[int]]]) -> list[list[list[int]]]:
    """The same forest with 40 tokens for each, so that a few sequences fill blocks."""
    return [[[token for token in member for _ in range(40)] for member in group] for group in batch]


@settings(deadline=None)
@given(forests, st.booleans(), st.none() | st.integers(1, 300))
def test_skipped_blocks_hold_nothing_and_full_blocks_are_seen_whole(
    batch: list[list[list[int]]], causal: bool, window: int | None
) -> None:
    layout = interval_layout(plan_row(stretched(batch), causal=causal))
    mask = layout.block_mask(window)
    count = len(layout.start)
    blocks = mask.kv_indices.shape[-1]
    missing = blocks * 128 - count
    padded = torch.nn.functional.pad(dense(layout, window), (0, missing, 0, missing)).view(blocks, 128, blocks, 128)
    for row in range(blocks):
        asked = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist()
        assert mask.full_kv_indices is not None
        assert mask.full_kv_num_blocks is not None
        whole = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist()
        assert not set(asked) & set(whole)
        for column in range(blocks):
            block = padded[row, :, column]
            if column in whole:
                assert block.all()
            elif column in asked:
                assert block.any() or window is not None
            else:
                assert not block.any()


def groups_of(vocabulary: int, *, typed: bool) -> list[list[EncodedResponse]]:
    generator = torch.Generator().manual_seed(1)

    def response(ids: tuple[int, ...]) -> EncodedResponse:
        return EncodedResponse(ids, tuple(int(i > len(ids) // 2) for i in range(len(ids))) if typed else None)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, vocabulary, (count,), generator=generator).tolist())

    prompt = some(140)
    return [
        [response(prompt + some(count)) for count in (3, 70, 150)],
        [response(some(60)), response(some(55))],
        [response((*prompt[:100], 6, 7)), response((*prompt[:100], 8))],
    ]


def load(path: Path, dtype: torch.dtype = torch.float32) -> RewardModule:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)
    return build_module(model.eval(), max_length=512)


@compiles
def test_with_the_last_layer_cut_short_too(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"))
    groups = groups_of(module.base.config.vocab_size, typed=False)
    with torch.inference_mode():
        expected = module(module.collate(groups))
    assert last_layer.try_it(module).taken
    assert attention.try_it(module, "flex").taken
    assert (module.execution.attention, module.execution.last_layer) == ("flex", "reward_tokens")
    with torch.inference_mode():
        row = module.collate(groups)
        assert isinstance(row, PackedBatch)
        assert isinstance(row.layout, IntervalLayout)
        torch.testing.assert_close(module(row), expected, atol=1e-5, rtol=0)


@compiles
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt_neox", {}),
        ("qwen3", {"kv_heads": 2}),
        ("mistral", {"kv_heads": 2, "sliding_window": 50}),
        ("bert", {}),
        ("modernbert", {"local_attention": 8}),
    ],
)
def test_rewards_are_those_of_gathered_attention_and_of_padded_batches(
    tmp_path: Path, family: str, options: dict[str, object]
) -> None:
    module = load(tiny_checkpoint(tmp_path, family, **options))
    groups = groups_of(module.base.config.vocab_size, typed=family == "bert")
    with torch.inference_mode():
        gathered = module(module.collate(groups))
        padded = module(pad(groups, pad_token_id=0))
        assert attention.try_it(module, "flex") == (True, "attention by FlexAttention")
        row = module.collate(groups)
        assert isinstance(row, PackedBatch)
        assert isinstance(row.layout, IntervalLayout)
        found = module(row)
    torch.testing.assert_close(found, gathered, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, padded, atol=1e-5, rtol=0)


def layout_of(module: RewardModule) -> object:
    row = module.collate(groups_of(module.base.config.vocab_size, typed=False))
    assert isinstance(row, PackedBatch)
    return row.layout


@compiles
def test_a_failed_compilation_falls_back_and_says_why(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"), torch.float64)
    choice = attention.try_it(module, "flex")
    assert "attention on gathered sequences, since FlexAttention failed" in choice.reason
    assert "float64" in choice.reason
    assert isinstance(layout_of(module), GatheredLayout)


@compiles
def test_rewards_that_differ_fall_back_and_say_so(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"))
    with torch.no_grad():
        module.base.score.weight[0, 0] = torch.nan  # no two NaN are alike
    choice = attention.try_it(module, "flex")
    assert choice.reason.endswith("FlexAttention gave rewards that differ by nan in a probe")
    assert isinstance(layout_of(module), GatheredLayout)


@compiles
def test_training_on_cpus_falls_back_as_gradients_are_missing(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama")).train()
    choice = attention.try_it(module, "flex", gradients=True)
    assert "no backward pass on CPUs" in choice.reason
    assert isinstance(layout_of(module), GatheredLayout)
    assert module.training


def test_gradients_are_compared_where_all_layers_end_even_if_no_weight_there_is_trained(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"))
    row = module.collate(groups_of(module.base.config.vocab_size, typed=False))
    assert isinstance(row, PackedBatch)
    trained = attention.gradient(module, row)
    module.requires_grad_(False)
    frozen = attention.gradient(module, row)
    assert trained.shape == (1, row.tokens, 32)
    assert trained.norm() > 0
    torch.testing.assert_close(frozen, trained)


@compiles
def test_a_module_that_is_tuned_for_training_takes_gathered_attention_on_cpus(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"))
    attention.try_it(module, "flex")
    assert isinstance(layout_of(module), IntervalLayout)
    tune(module, "training")
    assert isinstance(layout_of(module), GatheredLayout)
    module(module.collate(groups_of(module.base.config.vocab_size, typed=False))).sum().backward()


def test_a_choice_holds_for_its_type_of_device_only(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"))
    module.execution = Execution(device="cuda", attention="flex")
    assert isinstance(layout_of(module), GatheredLayout)


def test_cpus_take_gathered_attention_unless_asked(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"))
    assert attention.try_it(module) == (False, "")
    assert isinstance(layout_of(module), GatheredLayout)


def test_dropout_is_refused() -> None:
    layout = interval_layout(plan_row([[[1, 2, 3]]], causal=True))
    states = torch.zeros(1, 2, 3, 8)
    with pytest.raises(UnsupportedAttentionError, match="dropout"):
        layout.attend(states, states, states, AttentionOptions(dropout=0.1))
