"""Prefixes kept across steps: the rewards of plain transformers on one conversation at a time, and less to compute."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marginrm.attention.flex import interval_layout
from marginrm.encoding import EncodedResponse
from marginrm.packing import ROOT, UNCACHED, CachedStarts, plan_row, shared_prefix
from marginrm.reward_model import RewardModel
from support import zoo
from support.forward import load, one_by_one
from support.models import CHATML_TEMPLATE, tiny_checkpoint
from support.zoo import SEQUENCE

GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32, "attn_logit_softcapping": 2.0}
GPT_OSS = {
    "head_dim": 8,
    "sliding_window": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}


class Conversations:
    """Random token ids."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._generator = torch.Generator().manual_seed(3)

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, self._vocabulary, (count,), generator=self._generator).tolist())

    def responses(self, *sequences: tuple[int, ...]) -> list[EncodedResponse]:
        return [EncodedResponse(ids) for ids in sequences]


def checkpoint(folder: Path, family: str, options: dict[str, Any]) -> Path:
    if family not in {"Gemma2", "GptOss"}:
        return tiny_checkpoint(folder, family, **options)
    tok = zoo.tokenizer(CHATML_TEMPLATE, bos=True)
    zoo.write(folder, zoo.model_of(SEQUENCE, zoo.config_of(family, tok, **options)), tok)
    return folder


def traffic(some: Conversations) -> list[list[list[EncodedResponse]]]:
    """Steps as trainers and chats send them: samples one at a time and grouped, turns, a shared start, a repetition."""
    prompt, other, chat = some.tokens(70), some.tokens(50), some.tokens(40)
    turns = [chat := chat + some.tokens(count) for count in (30, 7, 45, 16)]
    again = prompt + some.tokens(25)
    return [
        [some.responses(again)],
        [some.responses(prompt + some.tokens(19)), some.responses(turns[0])],
        [some.responses(*(prompt + some.tokens(count) for count in (3, 12, 40))), some.responses(turns[1])],
        [some.responses(other + some.tokens(9)), some.responses(again), some.responses(turns[2])],
        [some.responses(prompt[:40] + other + some.tokens(8)), some.responses(turns[3])],
        [some.responses(*(other + prompt + some.tokens(count) for count in (1, 8))), some.responses(turns[3])],
    ]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt_neox", {}),  # partial rotary embeddings
        ("llama", {"kv_heads": 2}),  # with BOS
        ("qwen3", {"kv_heads": 2}),
        ("mistral", {"sliding_window": 40}),
        ("Gemma2", GEMMA),
        ("GptOss", GPT_OSS),
    ],
)
@pytest.mark.parametrize("short", [True, False])
def test_rewards_are_those_of_plain_transformers(
    tmp_path: Path, family: str, options: dict[str, Any], short: bool
) -> None:
    path = checkpoint(tmp_path, family, options)
    model = RewardModel.from_pretrained(path, dtype="float32", device="cpu", prefix_cache_mib=8)
    assert model.prefixes is not None
    assert "prefixes kept across steps, up to 8 MiB" in model.forward_reason
    if not short:
        model.module.execution = replace(model.module.execution, splits_prefix=False)
    truth = load(path)
    truth.set_attn_implementation("eager")
    hits = 0
    for groups in traffic(Conversations(truth.config.vocab_size)):
        result = model.run_step(groups, [""] * len(groups))
        with torch.no_grad():
            expected = one_by_one(truth, groups)
        found = torch.tensor([reward for rewards in result.rewards for reward in rewards])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        hits += result.prefixes.hits
        asked = sum(sum(len(one.ids) for one in group) - (len(group) - 1) * shared(group) for group in groups)
        assert sum(result.computed) + result.prefixes.tokens <= asked
    assert hits == 9


def shared(group: list[EncodedResponse]) -> int:
    return shared_prefix([one.array for one in group])


@pytest.fixture
def model(tmp_path: Path) -> RewardModel:
    path = tiny_checkpoint(tmp_path, "qwen3", kv_heads=2)
    return RewardModel.from_pretrained(path, dtype="float32", device="cpu", prefix_cache_mib=8)


@pytest.fixture
def some(model: RewardModel) -> Conversations:
    return Conversations(model.module.base.config.vocab_size)


def test_sixteen_samples_one_at_a_time_compute_their_prompt_once(model: RewardModel, some: Conversations) -> None:
    prompt = some.tokens(203)
    computed = sum(sum(model.run_step([some.responses(prompt + some.tokens(20))], [""]).computed) for _ in range(16))
    assert computed <= 203 + 16 * 20 + 15 * 15  # of each later sample the end of the prompt, less than a block


def test_eight_turns_of_a_chat_compute_each_token_about_once(model: RewardModel, some: Conversations) -> None:
    chat, computed = some.tokens(30), 0
    for _ in range(8):
        chat += some.tokens(45)
        computed += sum(model.run_step([some.responses(chat)], [""]).computed)
    assert len(chat) <= computed <= len(chat) + 7 * 15


def test_the_library_keeps_nothing_unless_asked(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama", chat_template=CHATML_TEMPLATE)
    plain = RewardModel.from_pretrained(path, dtype="float32")
    kept = RewardModel.from_pretrained(path, dtype="float32", prefix_cache_mib=None)
    assert plain.prefixes is None
    assert kept.prefixes is not None
    prompt = "Why is the sea grey? " * 9
    first = plain.score(prompt, ["Grey.", "I do not know."])
    assert kept.score(prompt, ["Grey.", "I do not know."]) == pytest.approx(first, abs=1e-5)
    assert kept.score(prompt, ["Grey.", "I do not know."]) == pytest.approx(first, abs=1e-5)
    assert kept.prefixes.size > 0
    assert RewardModel.from_module(kept.module, kept.encoder).prefixes is None


def test_tenants_share_nothing(model: RewardModel, some: Conversations) -> None:
    group = some.responses(some.tokens(80))
    hits = [model.run_step([group], [tenant]).prefixes.hits for tenant in ("ada", "bob", "ada", None)]
    assert hits == [0, 0, 1, 0]


def test_two_models_share_nothing(tmp_path: Path, some: Conversations) -> None:
    group = [some.responses(some.tokens(80))]
    for seed in (1, 2):
        path = tiny_checkpoint(tmp_path / str(seed), "qwen3", seed=seed)
        one = RewardModel.from_pretrained(path, dtype="float32", device="cpu", prefix_cache_mib=8)
        first, second = one.run_step(group, [""]), one.run_step(group, [""])
        assert (first.prefixes.hits, second.prefixes.hits) == (0, 1)
        with torch.no_grad():
            expected = one_by_one(load(path), group).tolist()
        assert second.rewards[0] == pytest.approx(expected, abs=1e-5)


def test_a_step_that_fails_leaves_no_trace(model: RewardModel, some: Conversations) -> None:
    assert model.prefixes is not None
    group = [some.responses(some.tokens(80))]
    layer = model.module.backbone.layers[1]  # type: ignore[index, union-attr]

    def fail(*_: object) -> None:
        raise RuntimeError("the device says no")

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="says no"):
        model.run_step(group, [""])
    hook.remove()
    assert model.prefixes.size == 0
    first = model.run_step(group, [""])
    assert first.prefixes.hits == 0
    assert model.run_step(group, [""]).rewards[0] == pytest.approx(first.rewards[0], abs=1e-5)


def test_keys_of_rewards_that_are_not_finite_are_not_kept(model: RewardModel, some: Conversations) -> None:
    assert model.prefixes is not None
    group = [some.responses(some.tokens(80))]
    head = model.module.base.score
    hook = head.register_forward_hook(lambda _module, _inputs, output: output * math.nan)  # type: ignore[union-attr]
    assert math.isnan(model.run_step(group, [""]).rewards[0][0])
    hook.remove()
    assert model.prefixes.size == 0


def test_a_step_out_of_memory_empties_the_cache(model: RewardModel, some: Conversations) -> None:
    assert model.prefixes is not None
    group = [some.responses(some.tokens(80))]
    model.run_step(group, [""])

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    hook = model.module.backbone.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model.run_step(group, [""])
    hook.remove()
    assert model.prefixes.size == 0
    assert model.run_step(group, [""]).prefixes.hits == 0


def test_a_small_cache_stays_within_its_bound(tmp_path: Path, some: Conversations) -> None:
    path = tiny_checkpoint(tmp_path / "small", "qwen3", kv_heads=2)
    kept = RewardModel.from_pretrained(path, dtype="float32", device="cpu", prefix_cache_mib=0.05)
    assert kept.prefixes is not None
    evicted = 0
    for _ in range(8):
        evicted += kept.run_step([some.responses(some.tokens(80))], [""]).prefixes.evicted
        assert 0 < kept.prefixes.size <= 0.05 * 2**20
    assert evicted > 0


def test_values_read_within_a_prefix_are_computed(model: RewardModel, some: Conversations) -> None:
    ids = some.tokens(120)
    group = [EncodedResponse(ids, read_at=(90, 119))]
    with model.prefixes.step([group], [""]) as step, torch.inference_mode():  # type: ignore[union-attr]
        expected = model.module(model.module.collate([group], prefixes=step))
        step.commit()
    with model.prefixes.step([group], [""]) as step, torch.inference_mode():  # type: ignore[union-attr]
        assert step.starts.lengths == (80,)
        found = model.module(model.module.collate([group], prefixes=step))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"deterministic": True}, "deterministic mode computes whole sequences"), ({}, "depend on the length")],
)
def test_a_model_that_keeps_none_says_why(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
    config = {} if options else {"rope_parameters": rope, "max_position_embeddings": 96}
    path = tiny_checkpoint(tmp_path, "llama", **config)
    model = RewardModel.from_pretrained(path, dtype="float32", prefix_cache_mib=8, **options)
    assert model.prefixes is None
    assert "prefixes not kept across steps, since" in model.forward_reason
    assert reason in model.forward_reason


def test_encoders_have_no_cache(tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(tiny_checkpoint(tmp_path, "bert"), dtype="float32", prefix_cache_mib=8)
    assert model.prefixes is None


tokens = st.lists(st.integers(0, 2), min_size=2, max_size=9)


@given(st.lists(tokens, min_size=1, max_size=6), st.integers(1, 8), st.none() | st.integers(1, 6))
def test_a_row_behind_cached_prefixes_sees_what_whole_sequences_see(
    sequences: list[list[int]], known: int, window: int | None
) -> None:
    prefixes = sorted({tuple(one[: min(known, len(one) - 1)]) for one in sequences[::2]})
    of_group = tuple(prefixes.index(tuple(one[: min(known, len(one) - 1)])) for one in sequences[::2])
    groups = [[one] for one in (*sequences[::2], *sequences[1::2])]
    starts = CachedStarts(tuple(map(len, prefixes)), of_group + (UNCACHED,) * len(sequences[1::2]))
    plan = plan_row(groups, causal=True, share_from=2, cached=starts)
    layout = interval_layout(plan)
    keys = [*((n, place) for n, ids in enumerate(prefixes) for place in range(len(ids)))]
    mask = layout.mask_function(window)
    count = len(plan.ids)
    sees = mask(torch.tensor(0), torch.tensor(0), torch.arange(count)[:, None], torch.arange(len(keys) + count)[None])
    for (ids,), leaf, prefix in zip(groups, plan.leaves, starts.of_group, strict=True):
        rows = [
            row for run in (*plan.ancestors(leaf), leaf) for row in range(plan.runs[run].start, plan.runs[run].stop)
        ]
        cached = [index for index, (number, _) in enumerate(keys) if number == prefix]
        sequence = [*cached, *(len(keys) + row for row in rows)]
        assert [*(() if prefix == UNCACHED else prefixes[prefix]), *plan.ids[rows].tolist()] == ids
        assert plan.position_ids[rows].tolist() == list(range(len(cached), len(ids)))
        for place, row in enumerate(rows, len(cached)):
            nearest = 0 if window is None else max(place - window + 1, 0)
            assert sees[row].nonzero()[:, 0].tolist() == sorted(sequence[nearest : place + 1])
    assert all(run.parent == ROOT or plan.runs[run.parent].cached == run.cached for run in plan.runs)
