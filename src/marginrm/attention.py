"""Attention over a packed row: every run sees its ancestors and itself, and nothing else.

The function is registered with transformers as `marginrm_packed`, so every model that goes through the
`AttentionInterface` runs on packed rows unchanged. Runs that look alike are computed in one call of scaled dot-product
attention; what they read is gathered from the row by index, which is exact and differentiable. Without a packed row
the function is transformers' own SDPA attention, so one loaded model takes packed and padded batches alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from marginrm.packing import ROOT, PackingPlan

ATTENTION_NAME = "marginrm_packed"
# Runs without a common parent share a call when padding the shorter to the longer wastes at most this share of it.
_MAX_WASTE = 0.25


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that packed rows cannot represent."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """Runs that are computed together, padded on the right to the longest.

    Attributes:
        lengths: Tokens of each run, [runs].
        longest: The most tokens of a run.
        context: Tokens of the ancestors that all these runs share, possibly 0.
        causal: Whether a token sees only what comes before it.
        ragged: Whether the runs differ in length.
        masks: The masks made so far, by window.
    """

    lengths: Tensor
    longest: int
    context: int
    causal: bool
    ragged: bool
    masks: dict[int | None, Tensor | None] = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> AttentionCall:
        """Returns the call on another device."""
        return replace(self, lengths=self.lengths.to(device), masks={})

    def mask(self, window: int | None) -> Tensor | None:
        """Returns the mask for a window (None: no window), made once for all layers."""
        if window not in self.masks:
            self.masks[window] = self._mask(window)
        return self.masks[window]

    def _mask(self, window: int | None) -> Tensor | None:
        """Returns which keys each query sees, [runs or 1, 1, longest, context + longest], or None for all.

        Args:
            window: Tokens see each other only at a distance below this one, in positions.
        """
        longest, before = self.longest, self.context
        if window is None and self.causal and before == 0:
            return None  # the caller asks for a causal kernel instead
        device = self.lengths.device
        own = torch.arange(longest, device=device) + before
        keys = torch.arange(before + longest, device=device)
        distance = own[:, None] - keys[None, :]
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            seen &= distance.abs() < window
        if self.causal or not self.ragged:
            # Right padding comes after every real query, so causality alone hides it.
            return None if bool(seen.all()) else seen[None, None]
        real = keys[None, :] < (before + self.lengths)[:, None]
        # A padded query keeps sight of the first key, since a softmax over nothing is NaN.
        padded = own[None, :] >= (before + self.lengths)[:, None]
        return torch.where(padded[:, :, None], keys == 0, seen & real[:, None, :])[:, None]


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Which tokens of a row the calls read, and where their results go; the same for every layer.

    Attributes:
        calls: The calls.
        queries: Row indices of all calls' queries, end to end, [sum of runs * longest].
        keys: Row indices of all calls' keys, context before own, [sum of runs * (context + longest)].
        order: Where each row token's result lies among the results of all calls, [tokens].
    """

    calls: tuple[AttentionCall, ...]
    queries: Tensor
    keys: Tensor
    order: Tensor

    def to(self, device: torch.device) -> AttentionLayout:
        """Returns the layout on another device."""
        return AttentionLayout(
            tuple(call.to(device) for call in self.calls),
            self.queries.to(device),
            self.keys.to(device),
            self.order.to(device),
        )


def attention_layout(plan: PackingPlan, *, causal: bool) -> AttentionLayout:
    """Groups a plan's runs into as few calls as exactness and little padding allow.

    Runs with the same parent form one call; runs without a parent are sorted by length and share a call with those of
    about the same length.
    """
    calls, queries, keys = [], [], []
    order = torch.empty(len(plan.ids), dtype=torch.long)
    base = 0
    for indices in _batches(plan):
        runs = [plan.runs[index] for index in indices]
        lengths = torch.tensor([run.length for run in runs])
        longest = int(lengths.max())
        starts = torch.tensor([run.start for run in runs])
        # Padding repeats a run's last token; its results are never read.
        own = starts[:, None] + torch.minimum(torch.arange(longest)[None, :], lengths[:, None] - 1)
        context = torch.tensor(plan.context(indices[0]), dtype=torch.long).expand(len(runs), -1)
        real = torch.arange(longest)[None, :] < lengths[:, None]
        order[own[real]] = torch.arange(base, base + own.numel()).view_as(own)[real]
        base += own.numel()
        queries.append(own.flatten())
        keys.append(torch.cat([context, own], dim=1).flatten())
        calls.append(AttentionCall(lengths, longest, context.shape[1], causal, bool((lengths != longest).any())))
    return AttentionLayout(tuple(calls), torch.cat(queries), torch.cat(keys), order)


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
        UnsupportedAttentionError: The model asks for soft-capping or attention sinks.
    """
    row = kwargs.pop("packed_row", None)
    if row is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for option in ("softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise UnsupportedAttentionError(f"attention with {option}")
    window = kwargs.get("sliding_window")
    layout: AttentionLayout = row.layout
    # One gather for all calls: its gradient is one scatter, where a gather per call would fill a whole row each.
    queries = _gathered(query, layout.queries, [call.lengths.numel() * call.longest for call in layout.calls])
    sizes = [call.lengths.numel() * (call.context + call.longest) for call in layout.calls]
    keys, values = _gathered(key, layout.keys, sizes), _gathered(value, layout.keys, sizes)
    results = [
        _run_call(call, own, seen, read, scaling, dropout, window)
        for call, own, seen, read in zip(layout.calls, queries, keys, values, strict=True)
    ]
    return torch.cat(results).index_select(0, layout.order)[None], None


def _gathered(tensor: Tensor, index: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Fetches tokens of [1, heads, tokens, head size] into one [tokens, heads, head size] per call."""
    return torch.split(tensor[0].transpose(0, 1).index_select(0, index), sizes)


def _run_call(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Returns the attention of one call, [runs * longest, heads, head size]."""
    runs = call.lengths.numel()
    mask = call.mask(window)
    query, key, value = (tensor.view(runs, -1, *tensor.shape[1:]).transpose(1, 2) for tensor in (query, key, value))
    result = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=call.causal and mask is None and call.longest > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result.transpose(1, 2).flatten(0, 1)


def _batches(plan: PackingPlan) -> Iterator[list[int]]:
    siblings: dict[int, list[int]] = {}
    for index, run in enumerate(plan.runs):
        siblings.setdefault(run.parent, []).append(index)
    roots = sorted(siblings.pop(ROOT, []), key=lambda index: plan.runs[index].length)
    batch: list[int] = []
    filled = 0
    for index in roots:
        length = plan.runs[index].length
        if filled + length < (1 - _MAX_WASTE) * length * (len(batch) + 1):
            yield batch
            batch, filled = [], 0
        batch.append(index)
        filled += length
    if batch:
        yield batch
    yield from siblings.values()


AttentionInterface.register(ATTENTION_NAME, packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
