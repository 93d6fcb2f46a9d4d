"""Rotary embeddings that depend on the longest sequence of a batch (transformers' `dynamic_rope_update`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


def length_boundary(config: PreTrainedConfig, max_length: int) -> int | None:
    """Returns the length up to which sequences rotate by other frequencies than beyond, or None.

    LongRoPE (arXiv 2402.13753) has short factors and long ones; transformers takes the long ones for a whole batch as
    soon as one of its sequences is longer than the original context. Dynamic NTK takes other frequencies for each length
    beyond it (`every_length_differs`). So a forward pass takes one kind of length.

    Args:
        config: The model's configuration.
        max_length: The longest sequence that it will be given, in tokens.
    """
    text = config.get_text_config()
    bounds = []
    for rope in _ropes(text):
        if rope.get("rope_type") == "dynamic":
            bounds.append(getattr(text, "max_position_embeddings", None))
        if rope.get("rope_type") == "longrope":
            own = rope.get("original_max_position_embeddings")
            bounds.append(own or getattr(text, "original_max_position_embeddings", None))
    found = [int(bound) for bound in bounds if bound and bound < max_length]
    return min(found) if found else None


def every_length_differs(config: PreTrainedConfig) -> bool:
    """Returns whether sequences of different lengths beyond the boundary have different frequencies (dynamic NTK)."""
    return any(rope.get("rope_type") == "dynamic" for rope in _ropes(config.get_text_config()))


def scaled_context(config: PreTrainedConfig) -> int | None:
    """Returns how many positions scaled rotary embeddings reach; None where they are not scaled.

    Dynamic NTK and YaRN (arXiv 2309.00071) reach their factor times the original context, which `max_position_embeddings`
    says for the former, and often for the latter too: Qwen's cards add YaRN and leave it as it is.
    """
    text = config.get_text_config()
    reached = []
    for rope in _ropes(text):
        original = {
            "dynamic": getattr(text, "max_position_embeddings", None),
            "yarn": rope.get("original_max_position_embeddings"),
        }.get(str(rope.get("rope_type")))
        if original and rope.get("factor"):
            reached.append(int(original * float(rope["factor"])))
    return min(reached) if reached else None


def forget_lengths(model: nn.Module) -> None:
    """Makes dynamic NTK take the frequencies of each forward pass's own length.

    transformers keeps those of the longest sequence so far until one within the original context comes
    (`dynamic_frequency_update`), so a reward would depend on what was computed before.
    """
    for part in model.modules():
        kinds = getattr(part, "rope_type", None)
        if "dynamic" in (kinds.values() if isinstance(kinds, dict) else [kinds]):
            part.register_forward_pre_hook(_forget)


def _forget(part: nn.Module, _: Any) -> None:
    for name in [name for name in vars(part) if name.endswith("max_seq_len_cached")]:
        setattr(part, name, 0)


def _ropes(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """Yields a model's RoPE parameters; some models have several, by type of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in given:
        yield given
    else:
        yield from (rope for rope in given.values() if isinstance(rope, Mapping))
