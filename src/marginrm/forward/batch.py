"""The inputs of a forward pass: responses packed into one row, or padded to one length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from marginrm.attention.gathered import gathered_layout
from marginrm.attention.layout import AttentionLayout, LayoutFn
from marginrm.encoding import EncodedGroup
from marginrm.packing import Ints, plan_row
from marginrm.prefix_cache import StepPrefixes
from marginrm.steps import GroupSlice


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Responses laid end to end in one row, a shared prefix only once.

    Attributes:
        ids: Token ids, [1, tokens].
        position_ids: Positions within the sequence each token came from, [1, tokens].
        type_ids: Segment ids for encoders that use them, [1, tokens], or None.
        first: Row index of each response's first token, [values]; responses with a shared prefix have it in common.
        last: Row index of the token that each value is read at in a decoder, [values]: the response's last one, or those
            of its steps. There are as many values as responses, unless `EncodedResponse.read_at` says otherwise.
        owner: The response that each token belongs to, [tokens], one more than the last for a filler; None for decoders,
            where a token may belong to many.
        start: First row index that attends to each token, [tokens].
        end: Row index after the last one that attends to it, [tokens].
        layout: How attention is computed over the row.
        costs: Tokens that each group put into the row.
        prefixes: The prefixes that are read from a cache, and the tokens that are kept in it; None for none.
        cached_before: Index of the cached prefix that each token's sequence begins with, or -1, [tokens].
    """

    ids: Tensor
    position_ids: Tensor
    type_ids: Tensor | None
    first: Tensor
    last: Tensor
    owner: Tensor | None
    start: Tensor
    end: Tensor
    layout: AttentionLayout
    costs: tuple[int, ...]
    prefixes: StepPrefixes | None = None
    cached_before: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that the forward pass computes."""
        return self.ids.shape[1]

    @property
    def rewards(self) -> int:
        """Number of values: one per response, or one per step."""
        return self.last.shape[0]

    def to(self, device: torch.device | str) -> PackedBatch:
        """Returns the batch on another device."""
        target = torch.device(device)
        return replace(
            self,
            ids=self.ids.to(target),
            position_ids=self.position_ids.to(target),
            type_ids=None if self.type_ids is None else self.type_ids.to(target),
            first=self.first.to(target),
            last=self.last.to(target),
            owner=None if self.owner is None else self.owner.to(target),
            start=self.start.to(target),
            end=self.end.to(target),
            layout=self.layout.to(target),
            cached_before=None if self.cached_before is None else self.cached_before.to(target),
        )


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """One sequence per response, padded on the right.

    Attributes:
        ids: Token ids, [responses, longest].
        mask: 1 for real tokens and 0 for padding, [responses, longest].
        type_ids: Segment ids, [responses, longest], or None.
        lengths: Number of real tokens, [responses].
        costs: Tokens that are computed for each group, padding included.
        read_at: Indices in the flattened ids of the tokens that steps are read at, [values]; None if each response has
            one value, at its last token.
    """

    ids: Tensor
    mask: Tensor
    type_ids: Tensor | None
    lengths: Tensor
    costs: tuple[int, ...]
    read_at: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that the forward pass computes, padding included."""
        return self.ids.numel()

    @property
    def rewards(self) -> int:
        """Number of responses."""
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> PaddedBatch:
        """Returns the batch on another device."""
        return replace(
            self,
            ids=self.ids.to(device),
            mask=self.mask.to(device),
            type_ids=None if self.type_ids is None else self.type_ids.to(device),
            lengths=self.lengths.to(device),
            read_at=None if self.read_at is None else self.read_at.to(device),
        )


@dataclass(frozen=True, slots=True)
class SplitBatch:
    """Responses that one forward pass cannot take together, as several batches.

    Attributes:
        parts: The batches.
        order: Index of each value among those of all parts, [values]: one per response, or one per step.
        costs: Tokens that are computed for each group.
    """

    parts: tuple[PackedBatch | PaddedBatch, ...]
    order: Tensor
    costs: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that the forward passes compute."""
        return sum(part.tokens for part in self.parts)

    @property
    def rewards(self) -> int:
        """Number of responses."""
        return self.order.shape[0]

    def to(self, device: torch.device | str) -> SplitBatch:
        """Returns the batch on another device."""
        return replace(self, parts=tuple(part.to(device) for part in self.parts), order=self.order.to(device))


Batch = PackedBatch | PaddedBatch | SplitBatch


def split(
    steps: Sequence[Sequence[GroupSlice]],
    groups: Sequence[EncodedGroup],
    collate: Callable[[Sequence[EncodedGroup]], PackedBatch | PaddedBatch],
) -> SplitBatch:
    """Makes one batch for each list of slices.

    Args:
        steps: Slices that together cover each response once.
        groups: Encoded responses.
        collate: Makes the batch of some groups.
    """
    parts = [collate([groups[part.group][part.start : part.stop] for part in step]) for step in steps]
    starts = np.cumsum([0, *(len(group) for group in groups)])
    values = np.cumsum([0, *(response.values for group in groups for response in group)])
    costs = [0] * len(groups)
    places: list[int] = []
    for step, batch in zip(steps, parts, strict=True):
        for part, cost in zip(step, batch.costs, strict=True):
            costs[part.group] += cost
            first = starts[part.group]
            places += range(values[first + part.start], values[first + part.stop])
    return SplitBatch(tuple(parts), torch.tensor(places).argsort(), tuple(costs))


def pack(
    groups: Sequence[EncodedGroup],
    *,
    causal: bool,
    layout: LayoutFn = gathered_layout,
    multiple: int = 1,
    prefixes: StepPrefixes | None = None,
) -> PackedBatch:
    """Packs groups into one row; decoders (causal) share prefixes, encoders share nothing.

    Args:
        groups: Encoded responses; rewards come in the order of the groups and of the responses in them.
        causal: Whether the model is a decoder.
        layout: Decides how attention is computed over the row; it affects rewards by rounding only.
        multiple: The row is filled to a multiple of so many tokens.
        prefixes: What a prefix cache has of these groups, for decoders; it also learns what to keep.
    """
    ids = [[response.array for response in group] for group in groups]
    plan = plan_row(ids, causal=causal, multiple=multiple, cached=prefixes.starts if prefixes else None)
    if prefixes:
        prefixes.choose(plan)
    responses = [response for group in groups for response in group]
    tokens = len(plan.ids)
    owner = None
    if not causal:
        owner = np.full(tokens, len(responses))  # a filler belongs to no response
        lengths = [response.tokens for response in responses]
        owner[: sum(lengths)] = np.repeat(np.arange(len(responses)), lengths)
    type_ids = None
    if not causal and any(response.types is not None for response in responses):
        type_ids = np.zeros((1, tokens), np.int64)
        kinds = np.concatenate([response.types for response in responses if response.types is not None])
        type_ids[0, : len(kinds)] = kinds
    start, end = plan.seen_by()
    last, first = plan.last, plan.first
    if any(response.read_at is not None for response in responses):
        last, first = plan.read_at([response.read_at for response in responses])
    return PackedBatch(
        ids=_tensor(plan.ids)[None],
        position_ids=_tensor(plan.position_ids)[None],
        type_ids=None if type_ids is None else _tensor(type_ids),
        first=torch.tensor(first),
        last=torch.tensor(last),
        owner=None if owner is None else _tensor(owner),
        start=_tensor(start),
        end=_tensor(end),
        layout=layout(plan),
        costs=plan.costs,
        prefixes=prefixes,
        cached_before=_tensor(plan.cached_before()) if plan.cached else None,
    )


def pad(groups: Sequence[EncodedGroup], *, pad_token_id: int | None) -> PaddedBatch:
    """Pads every response to the longest, on the right. The padding token does not matter, as the mask hides it."""
    responses = [response for group in groups for response in group]
    lengths = [response.tokens for response in responses]
    longest = max(lengths)
    ids = np.full((len(responses), longest), pad_token_id or 0)
    type_ids = np.zeros_like(ids) if any(response.types is not None for response in responses) else None
    for row, response in enumerate(responses):
        ids[row, : response.tokens] = response.array
        if type_ids is not None and response.types is not None:
            type_ids[row, : response.tokens] = response.types
    counts = torch.tensor(lengths)
    read_at = None
    if any(response.read_at is not None for response in responses):
        wanted = [(one.tokens - 1,) if one.read_at is None else one.read_at for one in responses]
        read_at = torch.tensor([row * longest + at for row, positions in enumerate(wanted) for at in positions])
    return PaddedBatch(
        ids=_tensor(ids),
        mask=(torch.arange(longest)[None, :] < counts[:, None]).long(),
        type_ids=None if type_ids is None else _tensor(type_ids),
        lengths=counts,
        costs=tuple(longest * len(group) for group in groups),
        read_at=read_at,
    )


def _tensor(array: Ints) -> Tensor:
    return torch.from_numpy(array)
