"""Packed rows against the model's own forward on one sequence at a time: rewards and gradients, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from marginrm.encoding import EncodedResponse
from marginrm.errors import HeadError
from marginrm.forward.batch import PackedBatch, pad
from marginrm.forward.eligibility import build_module
from marginrm.tuning.tune import tune
from support.forward import CASES, groups_of, load, one_by_one
from support.models import tiny_checkpoint


@pytest.mark.parametrize(("family", "options"), CASES)
def test_packed_and_padded_rewards_and_gradients_are_those_of_the_model_itself(
    tmp_path: Path, family: str, options: dict[str, object]
) -> None:
    path = tiny_checkpoint(tmp_path, family, **options)
    reference, model = load(path), load(path)
    groups = groups_of(model.config.vocab_size, typed=family == "bert")
    expected = one_by_one(reference, groups)
    weights = torch.linspace(-1, 1, len(expected))
    (weights * expected).sum().backward()

    module = build_module(model, max_length=512)
    assert module.forward_path == "packed", module.forward_reason
    row = module.collate(groups)
    assert isinstance(row, PackedBatch)
    rewards = module(row)
    (weights * rewards).sum().backward()

    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(module(pad(groups, pad_token_id=0)), expected, atol=1e-5, rtol=0)
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_shared_prompt_is_computed_once(tmp_path: Path) -> None:
    module = build_module(load(tiny_checkpoint(tmp_path, "llama")), max_length=512)
    prompt = tuple(range(5, 105))
    row = module.collate([[EncodedResponse((*prompt, 6, index)) for index in range(8)]])
    assert row.tokens == 101 + 8


@pytest.mark.parametrize(("family", "options"), [("gpt_neox", {}), ("llama", {"kv_heads": 2}), ("qwen3", {})])
def test_a_long_prefix_that_is_computed_apart_changes_neither_rewards_nor_gradients(
    tmp_path: Path, family: str, options: dict[str, object]
) -> None:
    path = tiny_checkpoint(tmp_path, family, **options)
    reference, model = load(path), load(path)
    module = build_module(model, max_length=512)
    tune(module, "training", whole_last_layer=True)
    prompt = tuple(5 + index * 7 % 200 for index in range(150))
    groups = [
        [EncodedResponse((*prompt, *range(start, start + count))) for start, count in ((9, 5), (50, 40), (80, 7))]
    ]
    row = module.collate(groups)
    assert isinstance(row, PackedBatch)
    assert any(call.prefix == 128 for call in row.layout.calls)
    expected, rewards = one_by_one(reference, groups), module(row)
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)
    weights = torch.tensor([1.0, -2.0, 0.5])
    (weights * expected).sum().backward()
    (weights * rewards).sum().backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "bert"])
@pytest.mark.parametrize("prompt", [20, 150])  # the longer one is computed apart
def test_mixed_precision_training_stays_close_to_float32(tmp_path: Path, family: str, prompt: int) -> None:
    module = build_module(load(tiny_checkpoint(tmp_path, family)), max_length=512)
    tune(module, "training")
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, module.base.config.vocab_size, (3, prompt + 30), generator=generator)
    ids[:, :prompt] = ids[0, :prompt]
    # Lengths that differ a little share a call, which for an encoder takes a mask.
    lines = [line[: len(line) - short] for line, short in zip(ids.tolist(), (0, 2, 3), strict=True)]
    row = module.collate([[EncodedResponse(tuple(line)) for line in lines]])
    gradients = []
    for mixed in (False, True):
        module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            rewards = module(row)
        assert rewards.dtype == torch.float32
        (rewards * torch.tensor([1.0, -2.0, 1.0])).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    exact, close = gradients
    assert torch.nn.functional.cosine_similarity(exact, close, dim=0) > 0.98


def test_gradient_checkpointing_keeps_the_gradients(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen2")
    gradients = []
    for checkpointing in (False, True):
        model = load(path).train()
        module = build_module(model, max_length=512)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        module(module.collate(groups_of(model.config.vocab_size))).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_bfloat16_keeps_a_float32_head(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama")
    exact = one_by_one(load(path), groups_of(300))
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.bfloat16)
    module = build_module(model.eval(), max_length=512)
    assert module.dtype == torch.bfloat16
    assert model.score.weight.dtype == torch.float32
    rewards = module(module.collate(groups_of(300)))
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards, exact, atol=0.1, rtol=0)


def test_a_head_with_two_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match="2 values per sequence"):
        build_module(load(tiny_checkpoint(tmp_path, "llama", num_labels=2)), max_length=512)
