"""Activations that training keeps: less of them, with the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from marginrm.encoding import EncodedResponse
from marginrm.forward.module import RewardModule
from marginrm.loading import load_for_training
from marginrm.tuning.tune import tune
from marginrm_training.run.activations import KeptBytes, RootMeanSquare, save_activations
from support import zoo

_TOKENS = 96  # of each of the two responses


def a_decoder(folder: Path, kind: str = "Llama") -> Path:
    tok = zoo.tokenizer()
    size = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3}
    zoo.write(folder, zoo.model_of(zoo.SEQUENCE, zoo.config_of(kind, tok, num_labels=1, **size)), tok)
    return folder


def trained_module(folder: Path, *, saving: bool, bfloat16: bool) -> RewardModule:
    module, _ = load_for_training(str(folder), seed=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        tune(module, "training")
        if saving:
            save_activations(module, recompute_mlps=True)
    return module.train()


def responses() -> list[list[EncodedResponse]]:
    ids = torch.randint(5, 60, (2, _TOKENS), generator=torch.Generator().manual_seed(3)).tolist()
    return [[EncodedResponse(tuple(one)) for one in ids]]


def kept_bytes_per_token(module: RewardModule) -> float:
    batch = module.collate(responses())
    with KeptBytes() as kept, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rewards = module(batch)
        total = kept.total
    rewards.sum().backward()
    return total / batch.tokens


def test_at_most_half_of_the_activations_are_kept(tmp_path: Path) -> None:
    folder = a_decoder(tmp_path / "llama")
    whole = kept_bytes_per_token(trained_module(folder, saving=False, bfloat16=True))
    saving = kept_bytes_per_token(trained_module(folder, saving=True, bfloat16=True))
    assert saving < 0.5 * whole


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma", "GPTNeoX"])
def test_gradients_are_those_of_transformers_forward(tmp_path: Path, kind: str) -> None:
    folder = a_decoder(tmp_path / kind, kind)
    module = trained_module(folder, saving=True, bfloat16=False)
    module(module.collate(responses())).sum().backward()
    found = {name: weight.grad for name, weight in module.classifier.named_parameters()}
    truth = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).train()
    truth.config.pad_token_id = None  # one sequence at a time: its last token is read
    for response in responses()[0]:
        truth(input_ids=torch.tensor([response.ids])).logits.sum().backward()
    for name, weight in truth.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, msg=name, rtol=1e-4, atol=1e-5)


def test_rewards_under_autocast_stay_the_same_to_the_bit(tmp_path: Path) -> None:
    folder = a_decoder(tmp_path / "qwen3", "Qwen3")  # its norms of queries and keys do not feed matrix products
    rewards = []
    for saving in (False, True):
        module = trained_module(folder, saving=saving, bfloat16=True)
        with torch.autocast("cpu", torch.bfloat16):
            rewards.append(module(module.collate(responses())).detach())
    torch.testing.assert_close(rewards[1], rewards[0], rtol=0, atol=0)


def test_norms_that_add_one_to_their_weight_stay_as_they_are(tmp_path: Path) -> None:
    module = trained_module(a_decoder(tmp_path / "gemma", "Gemma"), saving=True, bfloat16=False)
    assert "norms keep" not in module.forward_reason
    assert "3 MLPs are computed again" in module.forward_reason


def test_root_mean_square_has_the_gradients_of_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (torch.randn(*size, generator=generator) for size in ((2, 5, 16), (16,), (2, 5, 16)))
    found = []
    for norm in (
        lambda x, weight: RootMeanSquare.apply(x, weight, 1e-5, None),
        lambda x, weight: torch.nn.functional.rms_norm(x, (16,), weight, 1e-5),
    ):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        result = norm(*leaves)
        found.append((result, *torch.autograd.grad(result, leaves, gradient)))
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth)
