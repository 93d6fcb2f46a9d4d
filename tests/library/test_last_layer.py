"""The last layer at the rewards' tokens alone: the same rewards, less work, and the whole layer wherever that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from marginrm.forward.module import RewardModule
from marginrm.forward.self_check import tolerance
from marginrm.loading import load_for_scoring, load_for_training
from marginrm.tuning.last_layer import TruncatedLastLayer, last_layer, undo
from marginrm.tuning.tune import tune
from support.forward import CASES, groups_of
from support.models import tiny_checkpoint

SHORT = "last layer only where rewards are read"


def both(module: RewardModule, family: str) -> tuple[Tensor, Tensor]:
    """Returns rewards with the last layer whole, and as the module computes them."""
    groups = groups_of(module.base.config.vocab_size, typed=family == "bert")
    with torch.inference_mode():
        short = module(module.collate(groups))
        undo(module)
        return module(module.collate(groups)), short


def seen_by_linear_layers(module: RewardModule) -> dict[str, list[int]]:
    """Returns how many tokens each linear layer multiplied in one pass, by the layer's name."""
    rows: dict[str, list[int]] = {}

    def count(name: str) -> Any:
        return lambda _module, inputs, _output: rows.setdefault(name, []).append(
            inputs[0].numel() // inputs[0].shape[-1]
        )

    hooks = [
        part.register_forward_hook(count(name))
        for name, part in module.backbone.named_modules()
        if isinstance(part, nn.Linear)
    ]
    both(module, "")
    for hook in hooks:
        hook.remove()
    return rows


@pytest.mark.parametrize(("family", "options"), CASES)
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_rewards_stay(tmp_path: Path, family: str, options: dict[str, Any], dtype: Any, allowed: float) -> None:
    module, *_ = load_for_scoring(tiny_checkpoint(tmp_path, family, **options), dtype=dtype, device="cpu")
    assert (SHORT in module.forward_reason) == (options.get("classifier_pooling") != "mean")
    whole, short = both(module, family)
    assert len(set(whole.tolist())) > 4
    torch.testing.assert_close(short, whole, atol=allowed, rtol=allowed)


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "mistral"])
def test_a_window_in_the_last_layer_stays_a_window(tmp_path: Path, family: str) -> None:
    window = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 0} if family != "gpt_neox" else {}
    module, *_ = load_for_scoring(tiny_checkpoint(tmp_path, family, **window), dtype="float32", device="cpu")
    whole, short = both(module, family)
    torch.testing.assert_close(short, whole, atol=1e-5, rtol=0)


def test_all_after_the_keys_is_computed_for_few_tokens(tmp_path: Path) -> None:
    module, *_ = load_for_scoring(tiny_checkpoint(tmp_path, "llama"), dtype="float32", device="cpu")
    rows = seen_by_linear_layers(module)  # one pass with the layer short, one whole
    tokens = rows["layers.0.mlp.up_proj"][0]
    assert tokens > 100
    assert rows["layers.0.mlp.up_proj"] == [tokens, tokens]
    assert rows["layers.1.mlp.up_proj"] == [32, tokens]  # nine responses, filled up
    assert rows["layers.1.self_attn.o_proj"] == [32, tokens]
    assert rows["layers.1.self_attn.k_proj"] == [tokens, 32, tokens]


@pytest.mark.parametrize(("family", "options"), CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_stay(tmp_path: Path, family: str, options: dict[str, Any], checkpointing: bool) -> None:
    path = tiny_checkpoint(tmp_path, family, **options)
    gradients = []
    for short in (False, True):
        module, _ = load_for_training(path, seed=0)
        module.train()
        if checkpointing:
            module.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if short:
            tune(module, "training")
            tune(module, "training")  # a second trainer on the same module
            layer = last_layer(module)
            assert layer is not None
            cut = options.get("classifier_pooling") != "mean"
            assert isinstance(layer.forward, TruncatedLastLayer) == cut
            assert not (cut and isinstance(layer.forward.whole, TruncatedLastLayer))
            assert module.training
            assert module.execution.last_layer == ("reward_tokens" if cut else "whole")
        groups = groups_of(module.base.config.vocab_size, typed=family == "bert")
        rewards = module(module.collate(groups))
        (rewards * torch.linspace(-1, 1, len(rewards))).sum().backward()
        gradients.append({name: weight.grad for name, weight in module.named_parameters()})
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_rewards_alone_and_together_are_equal(tmp_path: Path) -> None:
    module, *_ = load_for_scoring(tiny_checkpoint(tmp_path, "qwen3"), dtype="float32", device="cpu")
    groups = groups_of(module.base.config.vocab_size)
    with torch.inference_mode():
        together = module(module.collate(groups))
        alone = torch.cat([module(module.collate([[response]])) for group in groups for response in group])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_layer_that_cannot_be_cut_stays_whole_and_says_so(tmp_path: Path) -> None:
    module, *_ = load_for_scoring(tiny_checkpoint(tmp_path, "llama"), dtype="float32", device="cpu", purpose=None)
    tokens: list[int] = []

    # As GPT-2, which views its output as the input's shape.
    def strict(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].shape[1] != tokens[-1]:
            raise RuntimeError(f"shape '[1, {tokens[-1]}, 32]' is invalid")

    def count(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        tokens.append(inputs[0].shape[1])

    module.base.get_input_embeddings().register_forward_pre_hook(count)
    module.backbone.norm.register_forward_pre_hook(strict)  # type: ignore[union-attr]
    tune(module, "scoring")
    assert module.execution.last_layer == "whole"
    assert "last layer whole" in module.forward_reason
    assert "is invalid" in module.forward_reason
    whole, short = both(module, "llama")
    assert torch.equal(whole, short)


def test_a_model_that_does_not_name_its_layers_keeps_them_whole(tmp_path: Path) -> None:
    module, *_ = load_for_scoring(tiny_checkpoint(tmp_path, "llama"), dtype="float32", device="cpu", purpose=None)
    module.base._no_split_modules = None
    tune(module, "scoring")
    assert module.execution.last_layer == "whole"
    assert "does not say which modules its layers are" in module.forward_reason


def test_a_probe_allows_for_the_dtype_that_products_are_computed_in(tmp_path: Path) -> None:
    module, _ = load_for_training(tiny_checkpoint(tmp_path, "bert"), seed=0)
    half, *_ = load_for_scoring(tiny_checkpoint(tmp_path, "bert"), dtype="bfloat16", device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = tolerance(module)
    assert under_autocast == tolerance(half) > 10 * tolerance(module)


def test_deterministic_models_compute_it_whole(tmp_path: Path) -> None:
    module, *_ = load_for_scoring(tiny_checkpoint(tmp_path, "llama"), dtype="float32", device="cpu", purpose=None)
    assert module.execution.last_layer == "whole"
