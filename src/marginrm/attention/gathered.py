"""Which tokens of a packed row each attention call reads: found once per row, the same for every layer.

A call computes a *rectangle*: whole sequences, one a line, padded on the right to one length. In a decoder causality
hides the padding, so no mask is needed; and what two lines share is read twice, but its result is taken from the first
only. Where a long prefix is common to several lines (a *trunk*), its attention is computed apart: all lines' queries
against one copy of the prefix, without a mask, and merged with the rest by their log-sum-exp. That is exact: softmax
over a union of keys is the mean of the parts' softmax, weighted by the parts' sums of exponentials.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from marginrm.attention.cpu_fused import CPUAttention
from marginrm.attention.cpu_matmul import product_attention
from marginrm.packing import ROOT, PackingPlan

# Below this many tokens a prefix is cheaper to read again in each line than to merge.
SPLIT_FROM = 128
# Lengths are rounded up to a multiple of this: fused kernels pay for a ragged end with up to 40% of their time.
_UNIT = 32
# Lines share a call when padding the shorter to the longer wastes at most this share of it.
_MAX_WASTE = 0.1


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that packed rows cannot represent."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """One attention call: lines of one padded length.

    Attributes:
        lengths: Real tokens of each line, [lines].
        longest: Tokens of a line, padding included.
        trunk: Tokens of the prefix that all lines see besides; 0 for whole sequences.
        causal: Whether a token sees only what comes before it.
        masks: The masks made so far, by window and dtype.
    """

    lengths: Tensor
    longest: int
    trunk: int
    causal: bool
    masks: dict[tuple[int | None, torch.dtype], Tensor | None] = field(default_factory=dict, compare=False)

    @property
    def lines(self) -> int:
        """How many sequences."""
        return self.lengths.shape[0]

    def to(self, device: torch.device) -> Rectangle:
        """Returns the call on another device."""
        return replace(self, lengths=self.lengths.to(device), masks={})

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Returns what is added to the scores, made once for all layers; None where causality or nothing hides keys.

        Args:
            window: Tokens see each other only at a distance below this one; None for no window.
            dtype: Of the scores.
        """
        if (window, dtype) not in self.masks:
            seen = self._seen(window)
            self.masks[window, dtype] = (
                None
                if seen is None
                else torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            )
        return self.masks[window, dtype]

    def _seen(self, window: int | None) -> Tensor | None:
        """Returns which keys each query sees, [lines or 1, 1, longest or 1, longest]."""
        if self.causal and window is None:
            return None
        places = torch.arange(self.longest, device=self.lengths.device)
        distance = places[:, None] - places[None, :]
        near = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            near = near & (distance.abs() < window)
        if self.causal:
            return near[None, None]
        real = places[None, :] < self.lengths[:, None]
        if window is None:
            return None if bool(real.all()) else real[:, None, None, :]
        # Padding sees itself alone, since a softmax over nothing is NaN.
        return (near & real[:, None, :] | torch.eye(self.longest, dtype=torch.bool, device=real.device))[:, None]


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """The calls over a row, and where what they read and write lies.

    Attributes:
        calls: The calls.
        tokens: Row indices of the calls' lines, end to end, [sum of lines * longest].
        trunks: Row indices of the calls' trunks, end to end, [sum of trunk].
        order: Where each row token's result lies among the results of all calls, [tokens].
        products: Whether causal calls are computed by matrix products, without gradients, instead of the fused kernel.
    """

    calls: tuple[Rectangle, ...]
    tokens: Tensor
    trunks: Tensor
    order: Tensor
    products: bool

    def to(self, device: torch.device) -> AttentionLayout:
        """Returns the layout on another device."""
        calls = tuple(call.to(device) for call in self.calls)
        tokens, trunks, order = (part.to(device) for part in (self.tokens, self.trunks, self.order))
        return AttentionLayout(calls, tokens, trunks, order, self.products)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float, window: int | None
    ) -> Tensor:
        """Computes a layer's attention over the row, as `Layout.attend` says.

        Raises:
            UnsupportedAttentionError: For a row whose prefixes are computed apart: a window, dropout or values of another
                size than keys.
        """
        # One gather for all calls: its gradient is one scatter, where a gather per call would fill a whole row each.
        sizes = [call.lines * call.longest for call in self.calls]
        lines = [_gathered(tensor, self.tokens, sizes) for tensor in (query, key, value)]
        depths = [call.trunk for call in self.calls]
        trunks = [_gathered(tensor, self.trunks, depths) for tensor in (key, value)]
        results = [
            _run_call(call, own, trunk, scale, dropout, window, products=self.products)
            for call, own, trunk in zip(self.calls, zip(*lines, strict=True), zip(*trunks, strict=True), strict=True)
        ]
        return torch.cat(results).index_select(0, self.order)[None]


def attention_layout(
    plan: PackingPlan, *, causal: bool, split_from: int | None = SPLIT_FROM, products: bool = False
) -> AttentionLayout:
    """Lays out a plan's sequences in as few calls as exactness and little padding allow.

    Args:
        plan: The row.
        causal: Whether a token sees only what comes before it.
        split_from: Prefixes of so many tokens that several sequences share are computed apart; None for never.
        products: As in `AttentionLayout`.
    """
    order = torch.empty(len(plan.ids), dtype=torch.long)
    calls, tokens, trunks = [], [], []
    base = 0
    for trunk, lines in _calls(plan, split_from if causal else None):
        lengths = torch.tensor([len(line) for line in lines])
        places = pad_sequence(lines, batch_first=True)  # padding reads token 0; its results are never taken
        if causal:
            places = F.pad(places, (0, -places.shape[1] % _UNIT))
        longest = places.shape[1]
        for number, line in enumerate(lines):
            order[line] = torch.arange(len(line)) + (base + number * longest)
        base += places.numel()
        calls.append(Rectangle(lengths, longest, len(trunk), causal))
        tokens.append(places.flatten())
        trunks.append(trunk)
    return AttentionLayout(tuple(calls), torch.cat(tokens), torch.cat(trunks), order, products)


unsplit_layout = partial(attention_layout, split_from=None)


def _calls(plan: PackingPlan, split_from: int | None) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yields the trunk and the lines of each call: those on a common trunk, or whole sequences of about one length."""
    found = sequences(plan)
    trunks = _trunks(plan, split_from)
    whole = [found[leaf] for leaf in plan.leaves if leaf not in trunks]
    on_trunk: dict[int, list[int]] = defaultdict(list)
    for leaf, trunk in trunks.items():
        on_trunk[trunk].append(leaf)
    whole += [found[trunk] for trunk in on_trunk]  # a trunk's own results come from a line like any other
    for lines in _alike(whole):
        yield torch.empty(0, dtype=torch.long), lines
    for trunk, leaves in on_trunk.items():
        shared = _aligned(len(found[trunk]), split_from)
        for lines in _alike([found[leaf][shared:] for leaf in leaves]):
            yield found[trunk][:shared], lines


def sequences(plan: PackingPlan) -> list[Tensor]:
    """Returns for each run the row indices from its sequence's first token to the run's last."""
    found: list[Tensor] = []
    for run in plan.runs:
        own = torch.arange(run.start, run.start + run.length)
        found.append(own if run.parent == ROOT else torch.cat([found[run.parent], own]))
    return found


def _trunks(plan: PackingPlan, split_from: int | None) -> dict[int, int]:
    """Returns for each leaf that has one the run that ends its trunk: the one that saves most reading."""
    under = [0] * len(plan.runs)
    for leaf in plan.leaves:
        for run in plan.ancestors(leaf):
            under[run] += 1
    best: dict[int, int] = {}
    for leaf in plan.leaves if split_from is not None else ():
        saved = {
            run: (under[run] - 1) * _aligned(plan.runs[run].offset + plan.runs[run].length, split_from)
            for run in plan.ancestors(leaf)
        }
        trunk = max(saved, key=lambda run: saved[run], default=ROOT)
        if trunk != ROOT and saved[trunk]:
            best[leaf] = trunk
    return best


def _aligned(length: int, split_from: int | None) -> int:
    """Returns how much of a prefix is worth computing apart: none of a short one, whole units of a long one."""
    if split_from is None or length < split_from:
        return 0
    unit = min(_UNIT, split_from)
    return length // unit * unit


def _alike(lines: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yields lines of about one length together, shortest first."""
    batch: list[Tensor] = []
    filled = 0
    for line in sorted(lines, key=len):
        if filled + len(line) < (1 - _MAX_WASTE) * len(line) * (len(batch) + 1):
            yield batch
            batch, filled = [], 0
        batch.append(line)
        filled += len(line)
    if batch:
        yield batch


def _gathered(tensor: Tensor, index: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Fetches tokens of [1, heads, tokens, head size] into one [tokens, heads, head size] per call."""
    return torch.split(tensor[0].transpose(0, 1).index_select(0, index), sizes)


def _run_call(
    call: Rectangle,
    own: tuple[Tensor, ...],
    trunk: tuple[Tensor, ...],
    scale: float | None,
    dropout: float,
    window: int | None,
    *,
    products: bool,
) -> Tensor:
    """Returns the attention of one call, [lines * longest, heads, head size]."""
    query, key, value = (part.view(call.lines, call.longest, *part.shape[1:]).transpose(1, 2) for part in own)
    mask = call.mask(window, query.dtype)
    causal = call.causal and mask is None
    if call.trunk and (window is not None or dropout or key.shape[-1] != value.shape[-1]):
        raise UnsupportedAttentionError("prefixes cannot be computed apart with a window, dropout or unequal heads")
    prefix_key, prefix_value = (part.transpose(0, 1)[None] if call.trunk else None for part in trunk)
    result: Tensor
    if products and causal and not dropout and not query.requires_grad:
        result = product_attention(query, key, value, prefix_key, prefix_value, scale)
    elif call.trunk or _backward_is_slow(query, value, dropout):
        result = CPUAttention.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            query, key, value, prefix_key, prefix_value, mask, causal, scale
        )
    else:
        result = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
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
