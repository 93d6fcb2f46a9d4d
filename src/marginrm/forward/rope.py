"""Rotary embeddings that depend on the longest sequence of a batch (transformers' `dynamic_rope_update`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig


def length_boundary(config: PreTrainedConfig, max_length: int) -> int | None:
    """Returns the length up to which sequences rotate by other frequencies than beyond, or None.

    LongRoPE (arXiv 2402.13753) has short factors and long ones; transformers takes the long ones for a whole batch as
    soon as one of its sequences is longer than the original context. So a forward pass takes one kind of length.

    Args:
        config: The model's configuration.
        max_length: The longest sequence that it will be given, in tokens.
    """
    text = config.get_text_config()
    bounds = [
        rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        for rope in _ropes(text)
        if rope.get("rope_type") == "longrope"
    ]
    found = [int(bound) for bound in bounds if bound and bound < max_length]
    return min(found) if found else None


def rope_obstacle(config: PreTrainedConfig, max_length: int) -> str | None:
    """Returns what rules out batches: dynamic NTK beyond the original context, where every length has its frequencies."""
    limit = getattr(config, "max_position_embeddings", None)
    dynamic = any(rope.get("rope_type") == "dynamic" for rope in _ropes(config))
    if dynamic and limit and max_length > limit:
        return f"dynamic RoPE beyond {limit:,} tokens depends on the longest sequence of the batch"
    return None


def _ropes(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """Yields a model's RoPE parameters; some models have several, by type of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in given:
        yield given
    else:
        yield from (rope for rope in given.values() if isinstance(rope, Mapping))
