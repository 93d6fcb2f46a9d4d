"""FlexAttention backend: the mask as one interval of queries per key.

A row is laid depth-first, so the tokens that continue a token lie in one stretch (`PackingPlan.seen_by`): the queries
from `start[k]` to before `end[k]` attend to key k. Two integers a token are the whole mask, and blocks of it that hold
nothing are never computed. Cached prefixes come before the row's own keys; the queries of each are one stretch, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from marginrm.attention.layout import AttentionOptions, KeysAndValues, UnsupportedAttentionError
from marginrm.packing import Ints, PackingPlan

_BLOCK = 128  # tokens a side; FlexAttention's kernels divide it
# Most kernels kept: one for each head size, dtype, gradient mode and kind of mask, of all models in the process.
_KERNELS = 64

MaskFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Kernel = Callable[[Tensor, Tensor, Tensor, BlockMask, float | None, bool], Tensor]


@dataclass(frozen=True, slots=True)
class IntervalLayout:
    """A row's mask as intervals. Keys are the tokens of the cached prefixes, and then those of the row.

    Attributes:
        start: First row index that attends to a key, [keys] int32.
        end: Row index after the last one, [keys] int32.
        key_position: Position of the key in its sequence, for windows, [keys] int32.
        position: Position of each of the row's tokens in its sequence, [tokens] int32.
        masks: The block masks made so far, by window: once per row, for all layers.
    """

    start: Tensor
    end: Tensor
    key_position: Tensor
    position: Tensor
    masks: dict[int | None, BlockMask] = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> IntervalLayout:
        """Returns the layout on another device."""
        start, end = self.start.to(device), self.end.to(device)
        return IntervalLayout(start, end, self.key_position.to(device), self.position.to(device))

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
            UnsupportedAttentionError: Soft-capping, sinks or dropout are asked for, or gradients on a CPU.
        """
        if not options.plain:
            raise UnsupportedAttentionError("FlexAttention is not used for soft-capping or attention sinks")
        if options.dropout:
            raise UnsupportedAttentionError("FlexAttention does not support dropout")
        if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
            raise UnsupportedAttentionError("FlexAttention has no backward pass on CPUs")
        if options.window not in self.masks:
            self.masks[options.window] = self.block_mask(options.window)
        if cached:
            key = torch.cat([*(known.key for known in cached), key[0]], 1)[None]
            value = torch.cat([*(known.value for known in cached), value[0]], 1)[None]
        gqa = query.shape[1] != key.shape[1]
        return _kernel()(query, key, value, self.masks[options.window], options.scale, gqa).transpose(1, 2)

    def mask_function(self, window: int | None) -> MaskFn:
        """Returns FlexAttention's `mask_mod`: whether row index `q` attends to key `k`."""
        start, end, position, key_position = self.start, self.end, self.position, self.key_position

        def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (start[k] <= q) & (q < end[k])

        if window is None:
            return sees
        reach = position + window  # a tensor, since each captured number would compile a kernel of its own
        key_reach = key_position + window

        def sees_near(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sees(batch, head, q, k) & (position[q] < key_reach[k]) & (key_position[k] < reach[q])

        return sees_near

    def block_mask(self, window: int | None) -> BlockMask:
        """Returns the blocks of keys that each block of queries reads, and which of them need the mask inside.

        They follow from the extremes of the blocks, whereas torch's `create_block_mask` fills a [tokens, tokens] mask.
        A window's blocks are found by positions alone, so a few may be read that hold nothing.
        """
        keys, tokens = self.start.shape[0], self.position.shape[0]
        start = _in_blocks(self.start, fill=tokens)  # no token attends to the padding
        end = _in_blocks(self.end, fill=0)
        queries = _in_blocks(self.position, fill=0)
        first = torch.arange(0, queries.numel(), _BLOCK, device=start.device)[:, None]
        last = first + (_BLOCK - 1)
        some = (start.amin(1) <= last) & (end.amax(1) > first)
        every = (start.amax(1) <= first) & (end.amin(1) > last)
        if window is not None:
            position = _in_blocks(self.key_position, fill=0)
            low, high = position.amin(1), position.amax(1)
            lowest, highest = queries.amin(1)[:, None], queries.amax(1)[:, None]
            some &= (lowest < high + window) & (low < highest + window)
            every &= (highest < low + window) & (high < lowest + window)
        return BlockMask.from_kv_blocks(
            *_listed(some & ~every),
            *_listed(every),
            BLOCK_SIZE=_BLOCK,
            mask_mod=self.mask_function(window),
            seq_lengths=(tokens, keys),
        )


def interval_layout(plan: PackingPlan) -> IntervalLayout:
    """Returns the intervals of a plan."""
    starts, ends = plan.seen_by()
    own = [[run for run in plan.runs if run.cached == prefix] for prefix in range(len(plan.cached))]
    first = np.repeat([min(run.start for run in runs) for runs in own], plan.cached)
    last = np.repeat([max(run.stop for run in runs) for runs in own], plan.cached)
    positions = np.concatenate([*(np.arange(length) for length in plan.cached), plan.position_ids])
    return IntervalLayout(
        _int32(np.concatenate([first, starts])),
        _int32(np.concatenate([last, ends])),
        _int32(positions),
        _int32(plan.position_ids),
    )


def _int32(values: Ints) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))


def _in_blocks(values: Tensor, *, fill: int) -> Tensor:
    """Returns values, filled up, by blocks, [blocks, _BLOCK]."""
    blocks = max(-(-len(values) // _BLOCK), 2)  # torch compiles another kernel for sizes of 1
    return F.pad(values, (0, blocks * _BLOCK - len(values)), value=fill).view(blocks, _BLOCK)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each row of [query blocks, key blocks] how many are set, and all columns, the set ones first; [1, 1, ...]."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@functools.cache
def _kernel() -> Kernel:
    """Returns the compiled kernel; without compilation torch would fill a [tokens, tokens] matrix of scores.

    Sizes are dynamic, so one compilation serves rows of any length, which need not be whole blocks; short rows take the
    same kernel, not the one for generating text. A graph break is an error, since torch's fallback is that matrix.
    """

    def call(
        query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None, enable_gqa: bool
    ) -> Tensor:
        return flex_attention(
            query,
            key,
            value,
            block_mask=mask,
            scale=scale,
            enable_gqa=enable_gqa,
            kernel_options={"BACKEND": "TRITON"},  # of no effect on CPUs
        )

    compiled: Kernel = torch.compile(  # type: ignore[call-overload]  # torch's stubs lack the limit
        call, dynamic=True, fullgraph=True, recompile_limit=_KERNELS
    )
    return compiled
