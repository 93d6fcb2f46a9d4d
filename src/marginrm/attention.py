"""Attention over a packed row: every token sees what comes before it in its own sequence, and nothing else.

The function is registered with transformers as `marginrm_packed`, so every model that goes through the
`AttentionInterface` runs on packed rows unchanged. What each call reads is gathered from the row by index
(`packed_layout`), which is exact and differentiable. Without a packed row the function is transformers' own SDPA
attention, so one loaded model takes packed and padded batches alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from marginrm.cpu_attention import CPUAttention
from marginrm.packed_layout import AttentionLayout, Rectangle

ATTENTION_NAME = "marginrm_packed"


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that packed rows cannot represent."""


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
        UnsupportedAttentionError: The model asks for soft-capping or attention sinks, or, for a row whose prefixes
            are computed apart, for a window, dropout or values of another size than keys.
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
    layout: AttentionLayout = row.layout
    # One gather for all calls: its gradient is one scatter, where a gather per call would fill a whole row each.
    sizes = [call.lines * call.longest for call in layout.calls]
    lines = [_gathered(tensor, layout.tokens, sizes) for tensor in (query, key, value)]
    depths = [call.trunk for call in layout.calls]
    trunks = [_gathered(tensor, layout.trunks, depths) for tensor in (key, value)]
    results = [
        _run_call(call, own, trunk, scaling, dropout, window)
        for call, own, trunk in zip(layout.calls, zip(*lines, strict=True), zip(*trunks, strict=True), strict=True)
    ]
    return torch.cat(results).index_select(0, layout.order)[None], None


def _gathered(tensor: Tensor, index: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Fetches tokens of [1, heads, tokens, head size] into one [tokens, heads, head size] per call."""
    return torch.split(tensor[0].transpose(0, 1).index_select(0, index), sizes)


def _run_call(
    call: Rectangle,
    own: tuple[Tensor, ...],
    trunk: tuple[Tensor, ...],
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Returns the attention of one call, [lines * longest, heads, head size]."""
    query, key, value = (part.view(call.lines, call.longest, *part.shape[1:]).transpose(1, 2) for part in own)
    mask = call.mask(window, query.dtype)
    causal = call.causal and mask is None
    if call.trunk and (window is not None or dropout or key.shape[-1] != value.shape[-1]):
        raise UnsupportedAttentionError("prefixes cannot be computed apart with a window, dropout or unequal heads")
    if call.trunk or _backward_is_slow(query, value, dropout):
        prefix = [part.transpose(0, 1)[None] for part in trunk] if call.trunk else [None, None]
        result: Tensor = CPUAttention.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            query, key, value, *prefix, mask, causal, scaling
        )
    else:
        result = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return result.transpose(1, 2).flatten(0, 1)


def _backward_is_slow(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether this is a backward pass of CPU kernels in half precision, which takes several times that in float32."""
    return (
        query.device.type == "cpu"
        and query.dtype != torch.float32
        and torch.is_grad_enabled()
        and query.requires_grad
        and not dropout
        and query.shape[-1] == value.shape[-1]
    )


AttentionInterface.register(ATTENTION_NAME, packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
