"""Attention by the kernel for matrix tiles (AMX): the same results as softmax attention of each sequence alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from marginrm.amx import kernels
from marginrm.amx.kernels import KernelUnavailableError, load_kernels
from marginrm.attention.amx import TileLayout, tile_layout
from marginrm.attention.layout import AttentionOptions, KeysAndValues
from marginrm.compiler import CACHE_VARIABLE
from marginrm.forward.batch import PackedBatch
from marginrm.loading import load_for_scoring
from marginrm.packing import UNCACHED, CachedStarts, PackingPlan, plan_row
from support.forward import groups_of, one_by_one
from support.models import tiny_checkpoint
from support.tiles import needs_tiles

Sequences = list[list[list[int]]]
PROMPT = list(range(1000, 1300))
# Two prompts with several responses, and sequences that share nothing, shorter and longer than a tile and a block.
GROUPS: Sequences = [
    [[*range(50), *range(100, 137)], [*range(50), 200, 201, 202]],
    [[*PROMPT, *range(start, start + length)] for start, length in ((2000, 1), (2100, 16), (2200, 33), (2300, 270))],
    [[7]],
    [list(range(400, 417))],
    [list(range(500, 1200))],
]


def attention(plan: PackingPlan, row: tuple[Tensor, Tensor, Tensor], cached: Sequence[KeysAndValues]) -> Tensor:
    """Returns the attention of each run to its sequence so far, in float64, [tokens, heads, value size]."""
    query, key, value = (part[0].double() for part in row)
    result = query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])
    for number, run in enumerate(plan.runs):
        above = [plan.runs[place] for place in reversed(plan.ancestors(number))] if run.parent >= 0 else []
        above.sort(key=lambda one: one.offset)
        places = [place for one in (*above, run) for place in range(one.start, one.stop)]
        keys, values = key[:, places], value[:, places]
        if run.cached != UNCACHED:
            known = cached[run.cached]
            keys, values = torch.cat([known.key.double(), keys], 1), torch.cat([known.value.double(), values], 1)
        keys, values = (part.repeat_interleave(len(query) // len(part), 0) for part in (keys, values))
        scores = query[:, run.start : run.stop] @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
        if plan.causal:
            seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - run.length)
            scores = scores.masked_fill(~seen, -torch.inf)
        result[run.start : run.stop] = (scores.softmax(-1) @ values).transpose(0, 1)
    return result


def heads_within_nan(tokens: int, heads: int, size: int) -> Tensor:
    """Returns random heads, [1, heads, tokens, size], with NaN between them in memory."""
    memory = torch.full((1, tokens, heads, size + 24), torch.nan, dtype=torch.bfloat16)
    memory[..., :size] = 1.5 * torch.randn(1, tokens, heads, size)
    return memory[..., :size].transpose(1, 2)


@needs_tiles
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "value_size"),
    [(4, 2, 128, 128), (4, 4, 64, 64), (6, 2, 32, 32), (3, 1, 80, 80), (2, 1, 256, 256), (5, 1, 16, 48)],
)
def test_results_are_those_of_each_sequence_alone(
    heads: int, key_heads: int, size: int, value_size: int, threads: int
) -> None:
    torch.manual_seed(0)
    for causal, groups in ((True, GROUPS), (False, [[member] for group in GROUPS for member in group])):
        plan = plan_row(groups, causal=causal, multiple=16)
        tokens = len(plan.ids)
        row = (
            heads_within_nan(tokens, heads, size),
            heads_within_nan(tokens, key_heads, size),
            heads_within_nan(tokens, key_heads, value_size),
        )
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                found = tile_layout(plan).attend(*row, AttentionOptions())
        finally:
            torch.set_num_threads(before)
        assert found.shape == (1, tokens, heads, value_size)
        torch.testing.assert_close(found[0].double(), attention(plan, row, ()), atol=0.03, rtol=0.01)


@needs_tiles
def test_cached_prefixes_come_before_the_row() -> None:
    torch.manual_seed(0)
    groups = [[list(range(440))], [list(range(500, 610))], [list(range(400)) + list(range(700, 777))]]
    plan = plan_row(groups, causal=True, multiple=16, cached=CachedStarts((400, 77), (0, 1, 0)))
    row = tuple(heads_within_nan(len(plan.ids), count, 64) for count in (4, 2, 2))
    assert len(row) == 3
    cached = [KeysAndValues(*(heads_within_nan(length, 2, 64)[0] for _ in range(2))) for length in (400, 77)]
    with torch.inference_mode():
        found = tile_layout(plan).attend(*row, AttentionOptions(), cached)
    torch.testing.assert_close(found[0].double(), attention(plan, row, cached), atol=0.03, rtol=0.01)


@needs_tiles
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "bert"])
def test_rewards_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path, family)
    module, *_ = load_for_scoring(folder, dtype="bfloat16", device="cpu", purpose=None)
    module.execution = replace(module.execution, attention="amx")
    groups = groups_of(module.base.config.vocab_size)
    batch = module.collate(groups)
    assert isinstance(batch, PackedBatch)
    assert isinstance(batch.layout, TileLayout)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = module(batch)
        expected = one_by_one(plain, groups)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


@needs_tiles
@pytest.mark.parametrize("options", [{"window": 9}, {"softcap": 5.0}, {"scale": -0.1}])
def test_what_it_does_not_compute_is_gathered(options: dict[str, float]) -> None:
    torch.manual_seed(0)
    plan = plan_row(GROUPS[:2], causal=True)
    row = tuple(torch.randn(1, 2, len(plan.ids), 32).bfloat16() for _ in range(3))
    assert len(row) == 3
    layout = tile_layout(plan)
    chosen = AttentionOptions(**options)  # type: ignore[arg-type]
    with torch.inference_mode():
        assert torch.equal(layout.attend(*row, chosen), layout.gathered.attend(*row, chosen))


@needs_tiles
def test_gradients_are_those_of_gathered_attention() -> None:
    plan = plan_row(GROUPS[:1], causal=True)
    row = tuple(torch.randn(1, 2, len(plan.ids), 32).bfloat16().requires_grad_() for _ in range(3))
    assert len(row) == 3
    tile_layout(plan).attend(*row, AttentionOptions()).float().square().sum().backward()
    assert all(part.grad is not None and bool(part.grad.abs().sum() > 0) for part in row)


def test_without_a_compiler_the_reason_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    load_kernels.cache_clear()
    try:
        with pytest.raises(KernelUnavailableError, match=r"no C\+\+ compiler \(no-such-compiler\)"):
            load_kernels()
        monkeypatch.setattr(kernels, "supported", lambda: True)
        module, *_ = load_for_scoring(tiny_checkpoint(tmp_path, "llama"), dtype="bfloat16", device="cpu")
    finally:
        load_kernels.cache_clear()
    assert module.execution.attention != "amx"
    assert "no attention by matrix tiles (AMX), since there is no C++ compiler" in module.forward_reason
