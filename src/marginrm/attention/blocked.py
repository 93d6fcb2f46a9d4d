"""Attention over a packed row in blocks whose shapes depend only on a sequence's own length: for deterministic mode.

Sequences are cut into blocks of positions (0 to 63, 64 to 127, ...). In a decoder a block of queries reads its sequence
up to the block's end, so a token is always computed by a kernel of the same shape, at the same place of the same block,
whatever else is in the row; a block that several sequences share is computed once. An encoder's sequence is computed
whole, padded to whole blocks. A mask hides the padding. The mask is always there, because a kernel without one rounds
differently. `tuning.deterministic` explains the use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from marginrm.attention.gathered import sequences_of
from marginrm.attention.layout import AttentionOptions, KeysAndValues, UnsupportedAttentionError
from marginrm.packing import Ints, PackingPlan

BLOCK = 64  # positions


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One attention call: a block of queries of some sequences of an equal-length batch, against keys from position 0.

    Attributes:
        first: The block's first position.
        queries: Positions of the block.
        sequences: Which sequences of the batch, [sequences]; None for all.
    """

    first: int
    queries: int
    sequences: Tensor | None

    @property
    def keys(self) -> int:
        """Positions that it reads, from 0 on."""
        return self.first + self.queries

    def to(self, device: torch.device) -> BlockCall:
        """Returns the call on another device."""
        return self if self.sequences is None else replace(self, sequences=self.sequences.to(device))


@dataclass(frozen=True, slots=True)
class EqualLengthBatch:
    """Sequences with one number of blocks.

    Attributes:
        tokens: Row indices, padded to whole blocks, [sequences, blocks * BLOCK].
        lengths: Real lengths, [sequences].
        calls: The calls over these sequences.
    """

    tokens: Tensor
    lengths: Tensor
    calls: tuple[BlockCall, ...]

    def to(self, device: torch.device) -> EqualLengthBatch:
        """Returns the batch on another device."""
        calls = tuple(call.to(device) for call in self.calls)
        return EqualLengthBatch(self.tokens.to(device), self.lengths.to(device), calls)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """All equal-length batches of a row.

    Attributes:
        batches: Sequences by their number of blocks.
        order: Index of each row token's result among the results of all calls, [tokens].
        causal: Whether a token attends only to the tokens before it.
        masks: The masks made so far, once per row for all layers.
    """

    batches: tuple[EqualLengthBatch, ...]
    order: Tensor
    causal: bool
    masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> BlockLayout:
        """Returns the layout on another device."""
        return BlockLayout(tuple(batch.to(device) for batch in self.batches), self.order.to(device), self.causal)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        cached: Sequence[KeysAndValues] = (),
    ) -> Tensor:
        """Computes a layer's attention over the row, as `AttentionLayout.attend` says.

        Raises:
            UnsupportedAttentionError: Soft-capping, sinks or cached prefixes are asked for.
        """
        if cached:
            raise UnsupportedAttentionError("attention in blocks computes whole sequences")
        if not options.plain:
            raise UnsupportedAttentionError("attention in blocks does not support soft-capping or attention sinks")
        results = []
        for number, batch in enumerate(self.batches):
            gathered = [part[0].transpose(0, 1)[batch.tokens].transpose(1, 2) for part in (query, key, value)]
            for place, call in enumerate(batch.calls):
                q, k, v = gathered if call.sequences is None else [part[call.sequences] for part in gathered]
                result = F.scaled_dot_product_attention(
                    q[:, :, call.first : call.keys],
                    k[:, :, : call.keys],
                    v[:, :, : call.keys],
                    attn_mask=self._mask(number, place, options.window, query.dtype),
                    dropout_p=options.dropout,
                    scale=options.scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
                results.append(result.transpose(1, 2).flatten(0, 1))
        return torch.cat(results).index_select(0, self.order)[None]

    def _mask(self, batch: int, place: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Returns the mask that is added to a call's scores, [sequences or 1, 1, queries, keys]."""
        name = (batch, place, window, dtype)
        if name not in self.masks:
            seen = self._seen(self.batches[batch], self.batches[batch].calls[place], window)
            self.masks[name] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        return self.masks[name]

    def _seen(self, batch: EqualLengthBatch, call: BlockCall, window: int | None) -> Tensor:
        places = torch.arange(call.keys, device=batch.lengths.device)
        distance = places[call.first : call.keys, None] - places[None, :]
        near = distance.abs() < (call.keys if window is None else window)
        if self.causal:
            return (near & (distance >= 0))[None, None]
        real = places[None, :] < batch.lengths[:, None]
        # Padding attends to itself, since a softmax over nothing is NaN.
        return (near & real[:, None, :] | (distance == 0))[:, None]


def block_layout(plan: PackingPlan) -> BlockLayout:
    """Lays out a plan's sequences in blocks."""
    found = sequences_of(plan)
    by_blocks: dict[int, list[Ints]] = defaultdict(list)
    for end in plan.ends:
        by_blocks[-(-len(found[end]) // BLOCK)].append(found[end])
    order = np.empty(len(plan.ids), np.int64)
    taken: set[int] = set()  # the last token of each block that has its call
    batches, base = [], 0
    for blocks, sequences in sorted(by_blocks.items()):
        longest = blocks * BLOCK
        tokens = np.zeros((len(sequences), longest), np.int64)
        for number, sequence in enumerate(sequences):
            tokens[number, : len(sequence)] = sequence
        calls = []
        for first, queries in [(start, BLOCK) for start in range(0, longest, BLOCK)] if plan.causal else [(0, longest)]:
            new: list[int] = []
            for number, sequence in enumerate(sequences):
                part = sequence[first : first + queries]
                if int(part[-1]) not in taken:
                    taken.add(int(part[-1]))
                    order[part] = np.arange(len(part)) + (base + len(new) * queries)
                    new.append(number)
            if new:
                chosen = None if len(new) == len(sequences) else torch.tensor(new)
                calls.append(BlockCall(first, queries, chosen))
                base += len(new) * queries
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        batches.append(EqualLengthBatch(torch.from_numpy(tokens), lengths, tuple(calls)))
    return BlockLayout(tuple(batches), torch.from_numpy(order), plan.causal)
