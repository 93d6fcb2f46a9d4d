"""The probe at load: each kind of classifier takes the best path that gives its own rewards, one conversation alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as t
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from marginrm.encoding import EncodedResponse
from marginrm.errors import HeadError, ModelError
from marginrm.forward.batch import SplitBatch
from marginrm.forward.eligibility import build_module
from marginrm.forward.module import RewardModule
from marginrm.forward.own_forward import vocabulary_of
from marginrm.forward.self_check import conversations
from marginrm.reward_model import RewardModel
from marginrm.steps import GroupSlice, split_by_length
from marginrm.tuning.tune import tune
from support.models import decoder_tokenizer

VOCABULARY = 384
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "num_labels": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
KEY_HEADS = {"num_key_value_heads": 2}
GEMMA = {**KEY_HEADS, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 48}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
GPT_OSS = {
    "head_dim": 8,
    "sliding_window": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {name: value for name, value in (SIZES | GEMMA).items() if name != "num_labels"}
PACKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "soft-capped scores, window on every other layer": (
        t.Gemma2Config,
        SIZES | GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0},
    ),
    "attention sinks": (t.GptOssConfig, SIZES | KEY_HEADS | GPT_OSS),
    "longrope": (
        t.Phi3Config,
        SIZES | KEY_HEADS | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    ),
    "dynamic NTK": (
        t.LlamaConfig,
        SIZES | KEY_HEADS | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "composite configuration": (
        t.Gemma3Config,
        {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4, "num_labels": 1, "pad_token_id": 1},
    ),
    "padding token -1": (t.LlamaConfig, SIZES | {"pad_token_id": -1}),
    "padding token none": (t.LlamaConfig, SIZES | {"pad_token_id": None}),
    "RoBERTa's positions": (t.RobertaConfig, SIZES | {"type_vocab_size": 1}),
    "XLM-R's positions": (t.XLMRobertaConfig, SIZES | {"type_vocab_size": 1}),
    "CamemBERT's positions": (t.CamembertConfig, SIZES | {"type_vocab_size": 1}),
}
PADDED: dict[str, tuple[Any, dict[str, Any]]] = {
    "relative positions": (
        t.DebertaV2Config,
        SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32},
    ),
    "linear attention": (
        t.Qwen3_5TextConfig,
        SIZES
        | KEY_HEADS
        | {
            "head_dim": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        },
    ),
    "pooled at the end token": (
        t.BartConfig,
        {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_labels": 1}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        | {"pad_token_id": 1, "eos_token_id": 2, "init_std": 0.2, "decoder_start_token_id": 2},
    ),
    "ALiBi": (t.BloomConfig, SIZES | {"n_layer": 3, "n_head": 4}),
    "attention outside of the interface": (t.FalconConfig, SIZES),
}


def built(config: Any) -> t.PreTrainedModel:
    torch.manual_seed(0)
    model: t.PreTrainedModel = t.AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.normal_(std=2.0)
    return model.eval()


def mixed_groups() -> list[list[EncodedResponse]]:
    generator = torch.Generator().manual_seed(7)

    def some(count: int) -> tuple[int, ...]:
        return (*torch.randint(5, VOCABULARY, (count - 1,), generator=generator).tolist(), 2)

    prompt, long = some(110)[:-1], some(150)[:-1]
    return [
        [EncodedResponse(prompt + some(count)) for count in (5, 40, 9)],  # on both sides of longrope's 128
        [EncodedResponse(some(7))],
        [EncodedResponse(long + some(count)) for count in (30, 3)],
        [EncodedResponse(some(200))],
    ]


def alone(model: t.PreTrainedModel, groups: list[list[EncodedResponse]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([one.ids])).logits[0, 0] for group in groups for one in group])


def rewards(module: RewardModule) -> torch.Tensor:
    model = RewardModel.from_module(module, encoder=None)  # type: ignore[arg-type]  # token ids are given
    model.row_multiple = 1
    return torch.tensor([reward for group in model.score_encoded(mixed_groups()) for reward in group])


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("purpose", [None, "scoring"])
def test_packed_rewards_are_those_of_each_sequence_alone(kind: str, purpose: Any) -> None:
    config_class, fields = PACKED[kind]
    model = built(config_class(**fields))
    expected = alone(model, mixed_groups())
    module = build_module(model, max_length=500)
    assert module.forward_path == "packed", module.forward_reason
    if purpose:
        tune(module, purpose)
    assert module.probe_difference is not None
    assert module.probe_difference < 1e-4
    torch.testing.assert_close(rewards(module), expected, atol=1e-4, rtol=1e-4)
    assert len(set(expected.tolist())) == len(expected)


def test_dynamic_ntk_beyond_its_context_takes_each_sequences_own_frequencies() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = t.LlamaConfig(**SIZES | KEY_HEADS | {"rope_parameters": rope, "max_position_embeddings": 100})
    # A fresh model for each sequence: transformers keeps the frequencies of the longest one before.
    expected = torch.cat([alone(built(config), [[one]]) for group in mixed_groups() for one in group])
    module = build_module(built(config), max_length=400)
    assert module.forward_path == "packed", module.forward_reason
    for _ in range(2):
        torch.testing.assert_close(rewards(module), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", PADDED)
def test_padded_rewards_are_those_of_each_sequence_alone_and_the_reason_is_told(kind: str) -> None:
    config_class, fields = PADDED[kind]
    model = built(config_class(**fields))
    expected = alone(model, mixed_groups())
    module = build_module(model, max_length=500)
    assert module.forward_path == "padded", module.forward_reason
    assert module.forward_reason.startswith("padded")
    assert "not packed: " in module.forward_reason
    torch.testing.assert_close(rewards(module), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["soft-capped scores, window on every other layer", "attention sinks"])
def test_gradients_of_unusual_scores_are_those_of_the_model_itself(kind: str) -> None:
    config_class, fields = PACKED[kind]
    reference, model = built(config_class(**fields)), built(config_class(**fields))
    groups = mixed_groups()
    expected = torch.cat([reference(input_ids=torch.tensor([one.ids])).logits[0] for group in groups for one in group])
    weights = torch.linspace(-1, 1, len(expected))
    (weights * expected).sum().backward()
    module = build_module(model, max_length=500)
    tune(module, "training")
    (weights * module(module.collate(groups))).sum().backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-4, rtol=1e-3, msg=name)


class Scaled(t.LlamaPreTrainedModel):
    """A class of a checkpoint's own: a linear `score`, which its forward changes."""

    def __init__(self, config: t.LlamaConfig) -> None:
        super().__init__(config)
        self.model = t.LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def last(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        places = attention_mask.sum(1) - 1
        return self.score(hidden[torch.arange(len(hidden)), places])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(score=3 * self.last(input_ids, attention_mask)[:, 0])


class BatchDependent(Scaled):
    """Adds the mean of the batch, so only a lone sequence has the documented reward."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        found = self.last(input_ids, attention_mask)
        return (found + 2 * found.mean(0, keepdim=True),)


class Unsteady(Scaled):
    """Gives another reward at each call."""

    calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        self.calls += 1
        return SimpleNamespace(logits=self.last(input_ids, attention_mask) + self.calls)


class NamelessEmbeddings(t.PreTrainedModel):
    """An own class whose embeddings transformers does not find."""

    def __init__(self, config: t.PreTrainedConfig) -> None:
        super().__init__(config)
        self.word = nn.Embedding(7, 4)
        self.post_init()


def test_the_vocabulary_of_own_code_is_the_configurations_where_embeddings_are_not_found() -> None:
    assert vocabulary_of(NamelessEmbeddings(t.PreTrainedConfig(vocab_size=7))) == 7  # type: ignore[call-arg]


def own(cls: type[Scaled]) -> Scaled:
    torch.manual_seed(0)
    return cls(t.LlamaConfig(**SIZES, **KEY_HEADS)).eval()


@pytest.mark.parametrize(("cls", "path"), [(Scaled, "padded"), (BatchDependent, "one_at_a_time")])
def test_a_classs_own_forward_is_the_truth(cls: type[Scaled], path: str) -> None:
    model = own(cls)
    expected = []
    with torch.no_grad():
        for one in (one for group in mixed_groups() for one in group):
            ids = torch.tensor([one.ids])
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            expected.append(float(output.score if cls is Scaled else output[0]))
    module = build_module(model, max_length=500)
    assert module.forward_path == path
    assert "the model's own forward" in module.forward_reason
    assert rewards(module).tolist() == pytest.approx(expected, abs=1e-4)
    assert model.score.weight.dtype == torch.float32


def test_a_model_that_no_path_reproduces_is_refused_with_all_that_was_tried() -> None:
    with pytest.raises(ModelError, match=r"packed: rewards differ .*; padded: .*; one at a time: rewards differ"):
        build_module(own(Unsteady), max_length=500)


def test_a_failing_forward_is_told_as_the_models() -> None:
    model = own(Scaled)
    model.forward = lambda **_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="Scaled's own forward fails on a conversation: ZeroDivisionError"):
        build_module(model, max_length=500)


def test_two_values_per_sequence_are_refused() -> None:
    with pytest.raises(HeadError, match="2 values per sequence"):
        build_module(built(t.LlamaConfig(**(SIZES | {"num_labels": 2}))), max_length=500)


def test_a_half_precision_head_is_float32_only_where_it_is_pooled() -> None:
    pooled = build_module(built(t.LlamaConfig(**SIZES)).bfloat16(), max_length=500)
    assert pooled.base.score.weight.dtype == torch.float32
    own_forward = build_module(own(Scaled).bfloat16(), max_length=500)
    assert own_forward.base.score.weight.dtype == torch.bfloat16
    assert not own_forward.base.score._forward_pre_hooks


def test_the_conversations_have_each_shape_and_fit_into_any_length() -> None:
    from marginrm.encoding import Encoder

    for length in (512, 40):
        encoder = Encoder(decoder_tokenizer(), max_length=length, architecture="decoder")
        groups = conversations(encoder)
        lengths = [len(one.ids) for group in groups for one in group]
        assert max(lengths) <= length
        assert min(lengths) < 30
    assert conversations(Encoder(decoder_tokenizer(), max_length=512, architecture="decoder"))[1][0].ids[:40]


def test_a_batch_on_both_sides_of_longropes_boundary_is_split_and_trains_like_each_sequence_alone() -> None:
    config_class, fields = PACKED["longrope"]
    reference, model = built(config_class(**fields)), built(config_class(**fields))
    module = build_module(model, max_length=500)
    groups = mixed_groups()
    batch = module.collate(groups)
    assert isinstance(batch, SplitBatch)
    assert (len(batch.parts), batch.rewards) == (2, 7)
    assert sum(batch.costs) == batch.tokens
    weights = torch.linspace(-1, 1, 7)
    expected = torch.cat([reference(input_ids=torch.tensor([one.ids])).logits[0] for group in groups for one in group])
    (weights * expected).sum().backward()
    (weights * module(batch)).sum().backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-4, rtol=1e-3, msg=name)


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4),
    st.none() | st.integers(1, 9),
    st.booleans(),
)
def test_a_split_step_covers_each_response_once_and_mixes_no_kinds(
    lengths: list[list[int]], boundary: int | None, alone: bool
) -> None:
    whole = [GroupSlice(number, 0, len(group)) for number, group in enumerate(lengths)]
    steps = list(split_by_length(whole, lengths, boundary, alone=alone))
    places = [(part.group, at) for step in steps for part in step for at in range(part.start, part.stop)]
    assert sorted(places) == [(number, at) for number, group in enumerate(lengths) for at in range(len(group))]
    for step in steps:
        found = [lengths[part.group][at] for part in step for at in range(part.start, part.stop)]
        assert len({boundary is not None and length > boundary for length in found}) == 1
        assert not alone or len(found) == 1
    assert alone or len(steps) <= 2
