"""Attention by plain matrix products: for scores that no fused kernel computes, and for CPUs where it is faster.

Scores may be soft-capped and have sinks, and everything is differentiable. Queries go in blocks of positions, all
sequences at once: their products with the keys up to the block's end, one softmax, one product with the values. A
prefix that the sequences share is multiplied once for all of them, into the same scores, so no merge is needed.

On CPUs without AMX, PyTorch's fused kernel computes bfloat16 at the rate of float32, and oneDNN's matrix products do
not; `tuning.attention` times both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from marginrm.attention.layout import AttentionOptions

_BLOCK = 128  # positions; half of a block's own square is masked
_SCORES = 2**21  # scores at a time, so that they stay in the processor's caches


def matmul_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Computes causal softmax attention of sequences, which may all attend to a shared prefix besides.

    Scores are rounded to the dtype of the queries before the softmax, as in transformers' eager attention. There is no
    backward pass, no window and no dropout.

    Args:
        query: [sequences, heads, tokens, head size].
        key: [sequences, key heads, tokens, head size]; key heads divide heads.
        value: [sequences, key heads, tokens, value size].
        prefix_key: [1, key heads, prefix tokens, head size], or None.
        prefix_value: [1, key heads, prefix tokens, value size], or None.
        options: Scale, soft-cap and sinks are read.

    Returns:
        [sequences, heads, tokens, value size].
    """
    sequences, heads, tokens, size = query.shape
    key_heads = key.shape[1]
    ratio = heads // key_heads  # heads that read the same keys lie side by side, as more rows of one product
    if prefix_key is None or prefix_value is None:
        prefix_key, prefix_value = key[:1, :, :0], value[:1, :, :0]
    scale = size**-0.5 if options.scale is None else options.scale
    rows = (query * scale).reshape(sequences, key_heads, ratio, tokens, size)
    rows = rows.permute(1, 0, 3, 2, 4).reshape(key_heads, sequences, tokens * ratio, size)
    key, value = key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
    sinks = None if options.sinks is None else options.sinks.to(query.dtype).view(key_heads, 1, 1, ratio)
    result = value.new_empty(key_heads, sequences, tokens * ratio, value.shape[-1])
    future = query.new_full((_BLOCK, _BLOCK), -torch.inf).triu_(1).repeat_interleave(ratio, 0)
    for first in range(0, tokens, _BLOCK):
        last = min(first + _BLOCK, tokens)
        block = slice(first * ratio, last * ratio)
        mask = future[: (last - first) * ratio, : last - first]
        at_once = max(1, _SCORES // (sequences * len(mask) * (prefix_key.shape[2] + last)))
        for start in range(0, key_heads, at_once):
            now = slice(start, start + at_once)
            result[now, :, block] = _block(
                rows[now, :, block],
                key[now, :, :last],
                value[now, :, :last],
                prefix_key[0, now],
                prefix_value[0, now],
                mask,
                options.softcap,
                None if sinks is None else sinks[now],
            )
    return result.view(key_heads, sequences, tokens, ratio, -1).permute(1, 0, 3, 2, 4).flatten(1, 2)


def _block(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Returns the attention of a block's rows to the prefix and to their sequences up to the block's end.

    Args:
        rows: Scaled queries, [key heads, sequences, rows, head size].
        key: [key heads, sequences, tokens, head size].
        value: [key heads, sequences, tokens, value size].
        prefix_key: [key heads, prefix tokens, head size].
        prefix_value: [key heads, prefix tokens, value size].
        mask: Added to the scores of the block with itself, [rows, positions of the block].
        softcap: As in `AttentionOptions`.
        sinks: [key heads, 1, 1, ratio], or None.
    """
    heads, sequences, count, size = rows.shape
    rows = rows.contiguous()
    prefix = prefix_key.shape[1]
    extra = 0 if sinks is None else 1  # the sinks' column, after all keys
    scores = rows.new_empty(heads, sequences, count, prefix + key.shape[2] + extra)
    # Written in place, side by side: copies of scores would cost as much as the products.
    torch.bmm(
        rows.view(heads * sequences, count, size),
        key.flatten(0, 1).transpose(1, 2),
        out=scores.flatten(0, 1)[..., prefix : prefix + key.shape[2]],
    )
    if prefix:
        torch.bmm(
            rows.view(heads, sequences * count, size),
            prefix_key.transpose(1, 2),
            out=scores.flatten(1, 2)[..., :prefix],
        )
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if sinks is not None:
        scores.view(heads, sequences, -1, sinks.shape[-1], scores.shape[-1])[..., -1] = sinks
    end = scores.shape[-1] - extra
    scores[..., end - mask.shape[1] : end] += mask
    shares = torch.softmax(scores, -1)
    result = torch.bmm(shares.flatten(0, 1)[..., prefix:end], value.flatten(0, 1)).view(heads, sequences, count, -1)
    if prefix:
        result += torch.bmm(shares.flatten(1, 2)[..., :prefix], prefix_value).view_as(result)
    return result


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Computes softmax attention under any mask, with gradients, and dropout if that is asked for.

    Args:
        query: [sequences, heads, queries, head size].
        key: [sequences, key heads, tokens, head size]; key heads divide heads.
        value: [sequences, key heads, tokens, value size].
        mask: Added to the scores, broadcast to [sequences, 1, queries, tokens]; None for none.
        options: As the layer passes them; the window has to be in the mask.

    Returns:
        [sequences, heads, queries, value size].
    """
    blocks = []
    for first in range(0, query.shape[2], _BLOCK):
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, first : first + _BLOCK]
        blocks.append(_masked_block(query[:, :, first : first + _BLOCK], key, value, part, options))
    return torch.cat(blocks, 2)


def _masked_block(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions) -> Tensor:
    sequences, heads, count, size = query.shape
    key_heads = key.shape[1]
    scale = size**-0.5 if options.scale is None else options.scale
    rows = (query * scale).reshape(sequences, key_heads, -1, size)  # heads of one key head, one after another
    scores = (rows @ key.transpose(2, 3)).view(sequences, heads, count, -1)
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if mask is not None:
        scores = scores + mask
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(sequences, -1, count, -1)
        scores = torch.cat([scores, sinks], -1)
    shares = torch.softmax(scores, -1)[..., : key.shape[2]]
    shares = F.dropout(shares, options.dropout, training=options.dropout > 0)
    result = shares.reshape(sequences, key_heads, -1, key.shape[2]) @ value
    return result.view(sequences, heads, count, -1)
