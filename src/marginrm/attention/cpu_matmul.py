"""Causal attention on CPUs by plain matrix products, where they are faster than PyTorch's fused kernel.

The fused kernel computes bfloat16 at the rate of float32 on processors without AMX; oneDNN's matrix products do not.
Queries go in blocks of positions, all sequences at once: their products with the keys up to the block's end, one
softmax, one product with the values. A prefix that the sequences share is multiplied once for all of them, into the
same scores, so no merge is needed. `tuning.attention` times it against the fused kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 128  # positions; half of a block's own square is masked
_SCORES = 2**21  # scores at a time, so that they stay in the processor's caches


def matmul_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Computes causal softmax attention of sequences, which may all attend to a shared prefix besides.

    Scores are rounded to the dtype of the queries before the softmax, as in transformers' eager attention. There is no
    backward pass.

    Args:
        query: [sequences, heads, tokens, head size].
        key: [sequences, key heads, tokens, head size]; key heads divide heads.
        value: [sequences, key heads, tokens, value size].
        prefix_key: [1, key heads, prefix tokens, head size], or None.
        prefix_value: [1, key heads, prefix tokens, value size], or None.
        scale: Factor on the dot products; None for 1 / sqrt(head size).

    Returns:
        [sequences, heads, tokens, value size].
    """
    sequences, heads, tokens, size = query.shape
    key_heads = key.shape[1]
    ratio = heads // key_heads  # heads that read the same keys lie side by side, as more rows of one product
    if prefix_key is None or prefix_value is None:
        prefix_key, prefix_value = key[:1, :, :0], value[:1, :, :0]
    rows = (query * (size**-0.5 if scale is None else scale)).reshape(sequences, key_heads, ratio, tokens, size)
    rows = rows.permute(1, 0, 3, 2, 4).reshape(key_heads, sequences, tokens * ratio, size)
    key, value = key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
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
            )
    return result.view(key_heads, sequences, tokens, ratio, -1).permute(1, 0, 3, 2, 4).flatten(1, 2)


def _block(rows: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, mask: Tensor) -> Tensor:
    """Returns the attention of a block's rows to the prefix and to their sequences up to the block's end.

    Args:
        rows: Scaled queries, [key heads, sequences, rows, head size].
        key: [key heads, sequences, tokens, head size].
        value: [key heads, sequences, tokens, value size].
        prefix_key: [key heads, prefix tokens, head size].
        prefix_value: [key heads, prefix tokens, value size].
        mask: Added to the scores of the block with itself, [rows, positions of the block].
    """
    heads, sequences, count, size = rows.shape
    rows = rows.contiguous()
    prefix = prefix_key.shape[1]
    scores = rows.new_empty(heads, sequences, count, prefix + key.shape[2])
    # Written in place, side by side: copies of scores would cost as much as the products.
    torch.bmm(
        rows.view(heads * sequences, count, size),
        key.flatten(0, 1).transpose(1, 2),
        out=scores.flatten(0, 1)[..., prefix:],
    )
    if prefix:
        torch.bmm(
            rows.view(heads, sequences * count, size),
            prefix_key.transpose(1, 2),
            out=scores.flatten(1, 2)[..., :prefix],
        )
    scores[..., -mask.shape[1] :] += mask
    shares = torch.softmax(scores, -1)
    result = torch.bmm(shares.flatten(0, 1)[..., prefix:], value.flatten(0, 1)).view(heads, sequences, count, -1)
    if prefix:
        result += torch.bmm(shares.flatten(1, 2)[..., :prefix], prefix_value).view_as(result)
    return result
