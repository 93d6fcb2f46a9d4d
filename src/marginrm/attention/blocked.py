"""Attention over a packed row in blocks whose shapes depend on nothing but a sequence's own length.

Sequences are cut into blocks of positions (0 to 63, 64 to 127, ...). In a decoder a block of queries reads its sequence
up to the block's end, so a token is always computed by a kernel of the same shape, at the same place of the same block,
whatever else is in the row; a block that several sequences have in common is computed once. An encoder's sequence is
computed whole, filled up to whole blocks. What fills up is hidden by a mask, which is always there: a kernel without one
rounds otherwise. `deterministic` says what this is for.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from marginrm.attention.gathered import sequences
from marginrm.packing import PackingPlan

BLOCK = 64  # positions


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call: a block of queries of some lines of a bundle, against these lines up to a length.

    Attributes:
        first: The block's first position.
        queries: Positions of the block.
        lines: Which lines of the bundle, [lines]; None for all.
    """

    first: int
    queries: int
    lines: Tensor | None

    @property
    def keys(self) -> int:
        """Positions that it reads, from 0 on."""
        return self.first + self.queries

    def to(self, device: torch.device) -> Call:
        """Returns the call on another device."""
        return self if self.lines is None else replace(self, lines=self.lines.to(device))


@dataclass(frozen=True, slots=True)
class Bundle:
    """Sequences of as many blocks.

    Attributes:
        tokens: Their row indices, filled up to whole blocks, [sequences, blocks * BLOCK].
        lengths: Their real lengths, [sequences].
        calls: Over these lines.
    """

    tokens: Tensor
    lengths: Tensor
    calls: tuple[Call, ...]

    def to(self, device: torch.device) -> Bundle:
        """Returns the bundle on another device."""
        return Bundle(self.tokens.to(device), self.lengths.to(device), tuple(call.to(device) for call in self.calls))


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """All bundles of a row.

    Attributes:
        bundles: Sequences by their number of blocks.
        order: Where each row token's result lies among the results of all calls, [tokens].
        causal: Whether a token sees only what comes before it.
        masks: The masks made so far, once per row for all layers.
    """

    bundles: tuple[Bundle, ...]
    order: Tensor
    causal: bool
    masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> BlockLayout:
        """Returns the layout on another device."""
        return BlockLayout(tuple(bundle.to(device) for bundle in self.bundles), self.order.to(device), self.causal)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float, window: int | None
    ) -> Tensor:
        """Computes a layer's attention over the row, as `Layout.attend` says."""
        results = []
        for number, bundle in enumerate(self.bundles):
            lines = [part[0].transpose(0, 1)[bundle.tokens].transpose(1, 2) for part in (query, key, value)]
            for place, call in enumerate(bundle.calls):
                q, k, v = lines if call.lines is None else [part[call.lines] for part in lines]
                result = F.scaled_dot_product_attention(
                    q[:, :, call.first : call.keys],
                    k[:, :, : call.keys],
                    v[:, :, : call.keys],
                    attn_mask=self._mask(number, place, window, query.dtype),
                    dropout_p=dropout,
                    scale=scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
                results.append(result.transpose(1, 2).flatten(0, 1))
        return torch.cat(results).index_select(0, self.order)[None]

    def _mask(self, bundle: int, place: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Returns what is added to a call's scores, [lines or 1, 1, queries, keys]."""
        name = (bundle, place, window, dtype)
        if name not in self.masks:
            seen = self._seen(self.bundles[bundle], self.bundles[bundle].calls[place], window)
            self.masks[name] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        return self.masks[name]

    def _seen(self, bundle: Bundle, call: Call, window: int | None) -> Tensor:
        places = torch.arange(call.keys, device=bundle.lengths.device)
        distance = places[call.first : call.keys, None] - places[None, :]
        near = distance.abs() < (call.keys if window is None else window)
        if self.causal:
            return (near & (distance >= 0))[None, None]
        real = places[None, :] < bundle.lengths[:, None]
        # What fills up sees itself alone, since a softmax over nothing is NaN.
        return (near & real[:, None, :] | (distance == 0))[:, None]


def block_layout(plan: PackingPlan, *, causal: bool) -> BlockLayout:
    """Lays out a plan's sequences in blocks.

    Args:
        plan: The row.
        causal: Whether a token sees only what comes before it.
    """
    found = sequences(plan)
    bundled: dict[int, list[Tensor]] = defaultdict(list)
    for leaf in plan.leaves:
        bundled[-(-len(found[leaf]) // BLOCK)].append(found[leaf])
    order = torch.empty(len(plan.ids), dtype=torch.long)
    taken: set[int] = set()  # the last token of each block that has its call
    bundles, base = [], 0
    for blocks, lines in sorted(bundled.items()):
        tokens = F.pad(pad_sequence(lines, batch_first=True), (0, BLOCK))[:, : blocks * BLOCK]
        calls = []
        for first, queries in [(block * BLOCK, BLOCK) for block in range(blocks)] if causal else [(0, blocks * BLOCK)]:
            fresh: list[int] = []
            for number, line in enumerate(lines):
                part = line[first : first + queries]
                if int(part[-1]) not in taken:
                    taken.add(int(part[-1]))
                    order[part] = torch.arange(len(part)) + (base + len(fresh) * queries)
                    fresh.append(number)
            if fresh:
                chosen = None if len(fresh) == len(lines) else torch.tensor(fresh)
                calls.append(Call(first, queries, chosen))
                base += len(fresh) * queries
        lengths = torch.tensor([len(line) for line in lines])
        bundles.append(Bundle(tokens, lengths, tuple(calls)))
    return BlockLayout(tuple(bundles), order, causal)
