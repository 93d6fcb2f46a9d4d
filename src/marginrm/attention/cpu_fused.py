"""Attention on CPUs by PyTorch's fused kernel, with a shared prefix computed once and a backward pass in float32."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - the only one with log-sum-exp
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001


class FusedCPUAttention(Function):
    """Softmax attention of sequences to themselves and to all of a prefix that they share.

    The backward pass computes in float32 even for bfloat16, whose kernel is several times slower. Both of its parts
    take the merged result and its log-sum-exp, since dP = P * (dO V^T - rowsum(dO * O)) with P = exp(QK^T - lse) holds
    for any subset of the keys (as in ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        """Returns [sequences, heads, tokens, head size].

        Args:
            ctx: The context of autograd.
            query: [sequences, heads, tokens, head size].
            key: [sequences, key heads, tokens, head size]; key heads divide heads.
            value: As `key`.
            prefix_key: [1, key heads, prefix tokens, head size], or None.
            prefix_value: As `prefix_key`.
            mask: Added to the scores of a sequence with itself, [sequences or 1, 1, tokens or 1, tokens], or None.
            causal: Whether a token attends only to those before it in its sequence (and to the whole prefix).
            scale: Factor on the dot products; None for 1 / sqrt(head size).
        """
        result, normaliser = _forward(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        if prefix_key is not None:
            prefix, other = _forward(_flat(query), prefix_key, prefix_value, 0.0, False, scale=scale)
            prefix, other = _unflat(prefix, query.shape[0]), _unflat(other[..., None], query.shape[0])[..., 0]
            share = torch.sigmoid(other - normaliser)[..., None]
            result = torch.lerp(result, prefix, share.to(result.dtype))
            normaliser = torch.logaddexp(normaliser, other)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, mask, result, normaliser)
        ctx.options = causal, scale
        return cast("Tensor", result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of query, key, value, prefix key and prefix value."""
        query, key, value, prefix_key, prefix_value, mask, result, normaliser = ctx.saved_tensors
        causal, scale = ctx.options
        dtype = query.dtype
        gradient, query, key, value, result = (part.float() for part in (gradient, query, key, value, result))
        d_query, d_key, d_value = _backward(
            gradient,
            query,
            key,
            value,
            result,
            normaliser,
            0.0,
            causal,
            attn_mask=None if mask is None else mask.float(),
            scale=scale,
        )
        d_prefix: list[Tensor | None] = [None, None]
        if prefix_key is not None:
            d_more, *d_prefix = _backward(
                _flat(gradient),
                _flat(query),
                prefix_key.float(),
                prefix_value.float(),
                _flat(result),
                _flat(normaliser[..., None])[..., 0],
                0.0,
                False,
                scale=scale,
            )
            d_query = d_query + _unflat(d_more, query.shape[0])
        grads = (d_query, d_key, d_value, *d_prefix)
        return (*(grad if grad is None else grad.to(dtype) for grad in grads), None, None, None)


def _flat(sequences: Tensor) -> Tensor:
    """[sequences, heads, tokens, size] -> [1, heads, sequences * tokens, size]."""
    return sequences.transpose(0, 1).flatten(1, 2)[None]


def _unflat(flat: Tensor, sequences: int) -> Tensor:
    """[1, heads, sequences * tokens, size] -> [sequences, heads, tokens, size]."""
    return flat[0].reshape(flat.shape[1], sequences, -1, flat.shape[-1]).transpose(0, 1)
