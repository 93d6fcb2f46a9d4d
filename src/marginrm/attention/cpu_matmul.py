"""Causal attention on CPUs by plain matrix products, where they are faster than PyTorch's fused kernel.

The fused kernel computes bfloat16 at the rate of float32 on processors without AMX; oneDNN's products do not. So
queries go in blocks of positions, all lines at once: their products with the keys up to the block's end, one softmax,
one product with the values. A prefix that the lines share is multiplied once for all of them, into the same scores, so
nothing has to be merged. Whether it pays is a matter of the processor: `speedup` tries it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from marginrm.tuning.timing import best_seconds

_BLOCK = 128  # positions; a block computes half of its own square in vain
_SCORES = 2**21  # at a time, so that they stay in the processor's caches
_TRIAL = 4, 256  # lines and tokens


def product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Computes causal softmax attention of lines of tokens, which may all see a common prefix besides.

    Scores are rounded to the dtype of the queries before the softmax, as in transformers' eager attention. There is no
    backward pass.

    Args:
        query: [lines, heads, tokens, head size].
        key: [lines, key heads, tokens, head size]; key heads divide heads.
        value: [lines, key heads, tokens, value size].
        prefix_key: [1, key heads, prefix tokens, head size], or None.
        prefix_value: [1, key heads, prefix tokens, value size], or None.
        scale: Factor on the dot products; None for 1 / sqrt(head size).

    Returns:
        [lines, heads, tokens, value size].
    """
    lines, heads, tokens, size = query.shape
    key_heads = key.shape[1]
    ratio = heads // key_heads  # heads that read the same keys lie side by side, as more rows of one product
    if prefix_key is None or prefix_value is None:
        prefix_key, prefix_value = key[:1, :, :0], value[:1, :, :0]
    rows = (query * (size**-0.5 if scale is None else scale)).reshape(lines, key_heads, ratio, tokens, size)
    rows = rows.permute(1, 0, 3, 2, 4).reshape(key_heads, lines, tokens * ratio, size)
    key, value = key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
    result = value.new_empty(key_heads, lines, tokens * ratio, value.shape[-1])
    future = query.new_full((_BLOCK, _BLOCK), -torch.inf).triu_(1).repeat_interleave(ratio, 0)
    for first in range(0, tokens, _BLOCK):
        last = min(first + _BLOCK, tokens)
        block = slice(first * ratio, last * ratio)
        mask = future[: (last - first) * ratio, : last - first]
        at_once = max(1, _SCORES // (lines * len(mask) * (prefix_key.shape[2] + last)))
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
    return result.view(key_heads, lines, tokens, ratio, -1).permute(1, 0, 3, 2, 4).flatten(1, 2)


def _block(rows: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, mask: Tensor) -> Tensor:
    """Returns the attention of a block's rows to the prefix and to their lines up to the block's end.

    Args:
        rows: Scaled queries, [key heads, lines, rows, head size].
        key: [key heads, lines, tokens, head size].
        value: [key heads, lines, tokens, value size].
        prefix_key: [key heads, prefix tokens, head size].
        prefix_value: [key heads, prefix tokens, value size].
        mask: Added to the scores of the block with itself, [rows, positions of the block].
    """
    heads, lines, count, size = rows.shape
    rows = rows.contiguous()
    prefix = prefix_key.shape[1]
    scores = rows.new_empty(heads, lines, count, prefix + key.shape[2])
    # Written in place, side by side: copies of scores would cost as much as the products.
    torch.bmm(
        rows.view(heads * lines, count, size),
        key.flatten(0, 1).transpose(1, 2),
        out=scores.flatten(0, 1)[..., prefix:],
    )
    if prefix:
        torch.bmm(
            rows.view(heads, lines * count, size),
            prefix_key.transpose(1, 2),
            out=scores.flatten(1, 2)[..., :prefix],
        )
    scores[..., -mask.shape[1] :] += mask
    shares = torch.softmax(scores, -1)
    result = torch.bmm(shares.flatten(0, 1)[..., prefix:], value.flatten(0, 1)).view(heads, lines, count, -1)
    if prefix:
        result += torch.bmm(shares.flatten(1, 2)[..., :prefix], prefix_value).view_as(result)
    return result


def speedup(heads: int, key_heads: int, size: int, dtype: torch.dtype) -> float:
    """Returns how many times as fast this is as PyTorch's fused kernel on this CPU, by a trial of milliseconds.

    Args:
        heads: Of the model.
        key_heads: Of the model.
        size: Of a head.
        dtype: Of the model.
    """
    lines, tokens = _TRIAL
    query = torch.randn(lines, heads, tokens, size, dtype=dtype)
    key = torch.randn(lines, key_heads, tokens, size, dtype=dtype)
    attend = F.scaled_dot_product_attention
    with torch.inference_mode():
        fused, products = best_seconds(
            lambda: attend(query, key, key, is_causal=True, enable_gqa=heads != key_heads),
            lambda: product_attention(query, key, key, None, None, None),
        )
    return fused / products
