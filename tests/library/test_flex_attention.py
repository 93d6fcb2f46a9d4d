"""FlexAttention over packed rows: its mask against what a plan says, its rewards against those of the other paths."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from marginrm.attention.flex import IntervalLayout, interval_layout
from marginrm.attention.gathered import AttentionLayout, UnsupportedAttentionError
from marginrm.encoding import EncodedResponse
from marginrm.forward.batch import PackedRow, pad
from marginrm.forward.module import RewardModule
from marginrm.packing import PackingPlan, plan_row
from marginrm.tuning.attention import _gradient, choose_attention
from marginrm.tuning.last_layer import shorten_last_layer
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
    plan = plan_row(batch, share_prefix=causal, share_from=share_from)
    layout = interval_layout(plan, causal=causal)
    assert torch.equal(dense(layout, window), brute_force(plan, window, causal=causal))


def stretched(batch: list[list[list[int]]]) -> list[list[list[int]]]:
    """The same forest with 40 tokens for each, so that a few sequences fill blocks."""
    return [[[token for token in member for _ in range(40)] for member in group] for group in batch]


@given(forests, st.booleans(), st.none() | st.integers(1, 300))
def test_blocks_that_are_left_out_hold_nothing_and_blocks_that_are_not_asked_are_seen_whole(
    batch: list[list[list[int]]], causal: bool, window: int | None
) -> None:
    layout = interval_layout(plan_row(stretched(batch), share_prefix=causal), causal=causal)
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
    return RewardModule(model.eval(), max_length=512)


@compiles
def test_with_the_last_layer_cut_short_too(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"))
    groups = groups_of(module.base.config.vocab_size, typed=False)
    with torch.inference_mode():
        expected = module(module.collate(groups))
    shorten_last_layer(module)
    choose_attention(module, "flex")
    assert module.flex_on
    assert module.short_last_layer
    with torch.inference_mode():
        row = module.collate(groups)
        assert isinstance(row, PackedRow)
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
def test_rewards_are_those_of_rectangles_and_of_padded_rows(
    tmp_path: Path, family: str, options: dict[str, object]
) -> None:
    module = load(tiny_checkpoint(tmp_path, family, **options))
    groups = groups_of(module.base.config.vocab_size, typed=family == "bert")
    with torch.inference_mode():
        rectangles = module(module.collate(groups))
        padded = module(pad(groups, pad_token_id=0))
        choose_attention(module, "flex")
        assert module.forward_reason.endswith("; attention by FlexAttention")
        row = module.collate(groups)
        assert isinstance(row, PackedRow)
        assert isinstance(row.layout, IntervalLayout)
        found = module(row)
    torch.testing.assert_close(found, rectangles, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, padded, atol=1e-5, rtol=0)


def layout_of(module: RewardModule) -> object:
    row = module.collate(groups_of(module.base.config.vocab_size, typed=False))
    assert isinstance(row, PackedRow)
    return row.layout


@compiles
def test_what_cannot_be_compiled_falls_back_and_says_why(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"), torch.float64)
    choose_attention(module, "flex")
    assert "attention on gathered lines, since FlexAttention failed" in module.forward_reason
    assert "float64" in module.forward_reason
    assert isinstance(layout_of(module), AttentionLayout)


@compiles
def test_rewards_that_differ_fall_back_and_say_so(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"))
    with torch.no_grad():
        module.base.score.weight[0, 0] = torch.nan  # no two NaN are alike
    choose_attention(module, "flex")
    assert module.forward_reason.endswith("FlexAttention gave rewards that differ by nan in a probe")
    assert isinstance(layout_of(module), AttentionLayout)


@compiles
def test_training_needs_gradients_which_there_are_none_of_on_cpus(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama")).train()
    choose_attention(module, "flex", gradients=True)
    assert "no backward pass on CPUs" in module.forward_reason
    assert isinstance(layout_of(module), AttentionLayout)
    assert module.training


def test_gradients_are_compared_where_all_layers_end_even_if_no_weight_there_is_trained(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"))
    row = module.collate(groups_of(module.base.config.vocab_size, typed=False))
    assert isinstance(row, PackedRow)
    trained = _gradient(module, row)
    module.requires_grad_(False)
    frozen = _gradient(module, row)
    assert trained.shape == (1, row.tokens, 32)
    assert trained.norm() > 0
    torch.testing.assert_close(frozen, trained)


@compiles
def test_a_module_that_is_trained_after_all_takes_rectangles_on_cpus(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"))
    choose_attention(module, "flex")
    assert isinstance(layout_of(module), IntervalLayout)
    assert isinstance(layout_of(module.train()), AttentionLayout)
    choose_attention(module.eval(), "rectangles")
    assert isinstance(layout_of(module), AttentionLayout)


def test_cpus_take_rectangles_unless_asked(tmp_path: Path) -> None:
    module = load(tiny_checkpoint(tmp_path, "llama"))
    reason = module.forward_reason
    choose_attention(module)
    assert module.forward_reason == reason
    assert isinstance(layout_of(module), AttentionLayout)


def test_dropout_is_refused() -> None:
    layout = interval_layout(plan_row([[[1, 2, 3]]], share_prefix=True), causal=True)
    states = torch.zeros(1, 2, 3, 8)
    with pytest.raises(UnsupportedAttentionError, match="dropout"):
        layout.attend(states, states, states, scale=None, dropout=0.1, window=None)
