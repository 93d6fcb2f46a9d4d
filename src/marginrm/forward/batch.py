"""What a reward model's forward pass takes: responses packed into one row, or padded into a rectangle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marginrm.attention.flex import seen_by
from marginrm.attention.gathered import attention_layout
from marginrm.attention.layout import Layout, LayoutFn
from marginrm.encoding import EncodedResponse
from marginrm.packing import plan_row

EncodedGroup = Sequence[EncodedResponse]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Responses laid end to end, what a group shares only once.

    Attributes:
        ids: Token ids, [1, tokens].
        position_ids: Positions within the sequence each token came from, [1, tokens].
        type_ids: Segment ids for encoders that use them, [1, tokens], or None.
        first: Row index of each response's first token, [responses]; with sharing it may be common to several.
        last: Row index of each response's last token, [responses].
        owner: The response that each token belongs to, [tokens]; None with sharing, where a token has many.
        start: First row index that sees each token, [tokens].
        end: Row index after the last that sees it, [tokens].
        layout: How attention goes over the row.
    """

    ids: Tensor
    position_ids: Tensor
    type_ids: Tensor | None
    first: Tensor
    last: Tensor
    owner: Tensor | None
    start: Tensor
    end: Tensor
    layout: Layout

    @property
    def tokens(self) -> int:
        """Number of tokens that the forward pass computes."""
        return self.ids.shape[1]

    @property
    def rewards(self) -> int:
        """Number of responses."""
        return self.last.shape[0]

    def to(self, device: torch.device | str) -> PackedRow:
        """Returns the row on another device."""
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
        )


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """One row per response, padded on the right.

    Attributes:
        ids: Token ids, [responses, longest].
        mask: 1 for real tokens and 0 for padding, [responses, longest].
        type_ids: Segment ids, [responses, longest], or None.
        lengths: Number of real tokens, [responses].
    """

    ids: Tensor
    mask: Tensor
    type_ids: Tensor | None
    lengths: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens that the forward pass computes, padding included."""
        return self.ids.numel()

    @property
    def rewards(self) -> int:
        """Number of responses."""
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> PaddedRows:
        """Returns the rows on another device."""
        return PaddedRows(
            self.ids.to(device),
            self.mask.to(device),
            None if self.type_ids is None else self.type_ids.to(device),
            self.lengths.to(device),
        )


def pack(groups: Sequence[EncodedGroup], *, causal: bool, layout: LayoutFn = attention_layout) -> PackedRow:
    """Packs groups into one row; decoders (causal) share prefixes, encoders share nothing.

    Args:
        groups: Encoded responses; rewards come in the order of the groups and of the responses in them.
        causal: Whether the model is a decoder.
        layout: Decides how attention goes over the row; of no effect on the rewards but for rounding.
    """
    plan = plan_row([[response.ids for response in group] for group in groups], share_prefix=causal)
    responses = [response for group in groups for response in group]
    lengths = torch.tensor([len(response.ids) for response in responses])
    typed = not causal and any(response.type_ids is not None for response in responses)
    type_ids = [kind for response in responses for kind in response.type_ids or ()] if typed else None
    start, end = seen_by(plan, causal=causal)
    return PackedRow(
        ids=torch.tensor([plan.ids]),
        position_ids=torch.tensor([plan.position_ids]),
        type_ids=None if type_ids is None else torch.tensor([type_ids]),
        first=torch.tensor([plan.runs[[*plan.ancestors(leaf), leaf][0]].start for leaf in plan.leaves]),
        last=torch.tensor(plan.last),
        owner=None if causal else torch.arange(len(responses)).repeat_interleave(lengths),
        start=start,
        end=end,
        layout=layout(plan, causal=causal),
    )


def pad(groups: Sequence[EncodedGroup], *, pad_token_id: int | None) -> PaddedRows:
    """Pads every response to the longest, on the right. Which token pads is of no effect, as the mask hides it."""
    responses = [response for group in groups for response in group]
    lengths = torch.tensor([len(response.ids) for response in responses])
    longest = int(lengths.max())
    ids = torch.full((len(responses), longest), pad_token_id or 0)
    typed = any(response.type_ids is not None for response in responses)
    type_ids = torch.zeros_like(ids) if typed else None
    for index, response in enumerate(responses):
        ids[index, : len(response.ids)] = torch.tensor(response.ids)
        if type_ids is not None and response.type_ids is not None:
            type_ids[index, : len(response.ids)] = torch.tensor(response.type_ids)
    mask = (torch.arange(longest)[None, :] < lengths[:, None]).long()
    return PaddedRows(ids, mask, type_ids, lengths)
