"""Attention over a packed row: every token sees what comes before it in its own sequence, and nothing else.

The function is registered with transformers as `marginrm_packed`, so every model that goes through the
`AttentionInterface` runs on packed rows unchanged. How it is computed is the row's layout's business: what each call
reads is gathered from the row by index (`packed_layout`, and in fixed shapes `block_layout`), or FlexAttention goes
over the row as it is (`interval_layout`); all are exact and differentiable. Without a packed row the function is
transformers' own SDPA attention, so one loaded model takes packed and padded batches alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from marginrm.attention.gathered import UnsupportedAttentionError
from marginrm.attention.layout import Layout

ATTENTION_NAME = "marginrm_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes a layer's attention over a packed row.

    Args:
        module: The model's attention module.
        query: [1, heads, tokens, head size].
        key: [1, key heads, tokens, head size]; key heads divide heads.
        value: As `key`.
        attention_mask: Used only when there is no packed row.
        scaling: Factor on the dot products.
        dropout: Attention dropout, for training.
        **kwargs: `packed_row` (a `rows.PackedRow`) and what the model passes besides.

    Returns:
        [1, tokens, heads, head size], and None for the weights, which are not materialised.

    Raises:
        UnsupportedAttentionError: The model asks for soft-capping or attention sinks, or for what the row's layout
            does not know.
    """
    row = kwargs.pop("packed_row", None)
    if row is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for option in ("softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise UnsupportedAttentionError(f"attention with {option}")
    if torch.is_autocast_enabled(query.device.type):  # it casts what SDPA is given, and knows no kernel of ours
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = kwargs.get("sliding_window")
    layout: Layout = row.layout
    return layout.attend(query, key, value, scale=scaling, dropout=dropout, window=window), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
