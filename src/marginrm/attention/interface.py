"""The attention function for packed rows, registered with transformers as `marginrm_packed`.

Every model that goes through transformers' `AttentionInterface` runs on packed rows unchanged: each token attends to
what comes before it in its own sequence (decoders) or to its own sequence (encoders), and to nothing else. The row's
layout decides how that is computed: `gathered`, `flex` or `blocked`; all are exact. Without a packed row the function
is transformers' own SDPA attention, so one loaded model takes packed and padded batches alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from marginrm.attention.layout import AttentionLayout, AttentionOptions, KeysAndValues

ATTENTION_NAME = "marginrm_packed"


class PrefixExchange(Protocol):
    """The keys and values that a forward pass reads from a prefix cache, and those that it gives to it."""

    def exchange(self, key: Tensor, value: Tensor) -> Sequence[KeysAndValues]:
        """Takes the row's keys and values of the pass's next attention call; returns those of the cached prefixes."""


class PackedInputs(Protocol):
    """The part of a packed batch that attention reads (`forward.batch.PackedBatch`)."""

    @property
    def layout(self) -> AttentionLayout:
        """How attention is computed over the row."""

    @property
    def prefixes(self) -> PrefixExchange | None:
        """The prefixes that are read from a cache, or kept in it; None for none."""


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
        value: [1, key heads, tokens, value size].
        attention_mask: Used only without a packed row.
        scaling: Factor on the dot products.
        dropout: Attention dropout, for training.
        **kwargs: `packed_batch` (`PackedInputs`) and the model's further options.

    Returns:
        [1, tokens, heads, value size], and None for the weights, which are not materialised.

    Raises:
        UnsupportedAttentionError: The model asks for an option that the row's layout does not support.
    """
    batch: PackedInputs | None = kwargs.pop("packed_batch", None)
    if batch is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if torch.is_autocast_enabled(query.device.type):  # autocast casts the inputs of SDPA, but not of our kernels
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    options = AttentionOptions(
        scale=scaling,
        dropout=dropout,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    cached = batch.prefixes.exchange(key, value) if batch.prefixes else ()
    return batch.layout.attend(query, key, value, options, cached), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
