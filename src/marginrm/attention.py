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
        query: Row indices of the queries, [runs, longest]; padding repeats the run's last token.
        context: Row indices of the tokens that all these runs share as ancestors, [context], possibly empty.
        lengths: Tokens of each run, [runs].
        causal: Whether a token sees only what comes before it.
        ragged: Whether the runs differ in length.
        masks: The masks made so far, by window.
    """

    query: Tensor
    context: Tensor
    lengths: Tensor
    causal: bool
    ragged: bool
    masks: dict[int | None, Tensor | None] = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> AttentionCall:
        """Returns the call with its indices on another device."""
        return replace(
            self,
            query=self.query.to(device),
            context=self.context.to(device),
            lengths=self.lengths.to(device),
            masks={},
        )

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
        longest, before = self.query.shape[1], self.context.shape[0]
        if window is None and self.causal and before == 0:
            return None  # the caller asks for a causal kernel instead
        device = self.query.device
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


def attention_calls(plan: PackingPlan, *, causal: bool) -> tuple[AttentionCall, ...]:
    """Groups a plan's runs into as few calls as exactness and little padding allow.

    Runs with the same parent form one call; runs without a parent are sorted by length and share a call with those of
    about the same length.
    """
    return tuple(_call(plan, indices, causal=causal) for indices in _batches(plan))


def row_order(plan: PackingPlan, calls: tuple[AttentionCall, ...]) -> Tensor:
    """Returns, for each row index, where its result lies among the results of all calls laid end to end, [tokens]."""
    order = torch.empty(len(plan.ids), dtype=torch.long)
    base = 0
    for call in calls:
        runs, longest = call.query.shape
        real = torch.arange(longest)[None, :] < call.lengths[:, None]
        order[call.query[real]] = torch.arange(base, base + runs * longest).view(runs, longest)[real]
        base += runs * longest
    return order


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
    # [tokens, heads, head size]: one gather then fetches whole tokens.
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    results = [_run_call(call, query, key, value, scaling, dropout, window) for call in row.calls]
    flat = torch.cat([result.flatten(0, 1) for result in results])
    return flat[row.order][None], None


def _run_call(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Returns the attention of one call, [runs, longest, heads, head size]."""
    runs = call.query.shape[0]
    index = torch.cat([call.context.expand(runs, -1), call.query], dim=1) if len(call.context) else call.query
    mask = call.mask(window)
    result = F.scaled_dot_product_attention(
        query[call.query].transpose(1, 2),
        key[index].transpose(1, 2),
        value[index].transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=call.causal and mask is None and call.query.shape[1] > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result.transpose(1, 2)


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


def _call(plan: PackingPlan, indices: list[int], *, causal: bool) -> AttentionCall:
    runs = [plan.runs[index] for index in indices]
    longest = max(run.length for run in runs)
    lengths = torch.tensor([run.length for run in runs])
    starts = torch.tensor([run.start for run in runs])
    within = torch.minimum(torch.arange(longest)[None, :], lengths[:, None] - 1)
    return AttentionCall(
        query=starts[:, None] + within,
        context=torch.tensor(plan.context(indices[0]), dtype=torch.long),
        lengths=lengths,
        causal=causal,
        ragged=bool((lengths != longest).any()),
    )


AttentionInterface.register(ATTENTION_NAME, packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
