"""What each token of a packed row is seen by, as intervals of the row: the form that FlexAttention takes.

A row is laid depth-first, so what continues a token lies in one stretch: key k is seen by the queries from `start[k]` to
before `end[k]`. In a decoder that is from the token itself to the end of what branches from its run; in an encoder it
is its sequence. Two integers a token are the whole mask, and blocks of it that nobody sees are never computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from marginrm.attention.gathered import UnsupportedAttentionError
from marginrm.packing import ROOT, PackingPlan

_BLOCK = 128  # tokens a side; FlexAttention's kernels divide it
# Kernels kept at most: one for each head size, dtype, grad mode, kind of mask and so on of all models in the process.
_KERNELS = 64

MaskFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Kernel = Callable[[Tensor, Tensor, Tensor, BlockMask, float | None, bool], Tensor]


@dataclass(frozen=True, slots=True)
class IntervalLayout:
    """A row's mask as intervals; [tokens] int32 each.

    Attributes:
        start: First row index that sees a token.
        end: Row index after the last that sees it.
        position: Position of the token in its sequence, for windows.
        masks: The block masks made so far, by window: once per row, for all layers.
    """

    start: Tensor
    end: Tensor
    position: Tensor
    masks: dict[int | None, BlockMask] = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> IntervalLayout:
        """Returns the layout on another device."""
        return IntervalLayout(self.start.to(device), self.end.to(device), self.position.to(device))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float, window: int | None
    ) -> Tensor:
        """Computes a layer's attention over the row, as `Layout.attend` says.

        Raises:
            UnsupportedAttentionError: Dropout is asked for, or gradients on a CPU.
        """
        if dropout:
            raise UnsupportedAttentionError("FlexAttention knows no dropout")
        if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
            raise UnsupportedAttentionError("FlexAttention has no backward pass on CPUs")
        if window not in self.masks:
            self.masks[window] = self.block_mask(window)
        gqa = query.shape[1] != key.shape[1]
        return _kernel()(query, key, value, self.masks[window], scale, gqa).transpose(1, 2)

    def mask_function(self, window: int | None) -> MaskFn:
        """Returns FlexAttention's `mask_mod`: whether row index `q` sees row index `k`."""
        start, end, position = self.start, self.end, self.position

        def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (start[k] <= q) & (q < end[k])

        if window is None:
            return sees
        reach = position + window  # a tensor, since a captured number would take a kernel of its own

        def sees_near(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sees(batch, head, q, k) & (position[q] < reach[k]) & (position[k] < reach[q])

        return sees_near

    def block_mask(self, window: int | None) -> BlockMask:
        """Returns which blocks of keys each block of queries reads, and within which of them the mask has to be asked.

        It is found from the blocks' extremes, since torch's `create_block_mask` fills a [tokens, tokens] mask for it.
        A window's blocks are told by positions alone, so a few may be read in which nothing is seen.
        """
        tokens = self.start.shape[0]
        # Two blocks at least: torch compiles sizes of 1 apart.
        blocks = max(-(-tokens // _BLOCK), 2)
        missing = blocks * _BLOCK - tokens
        start = F.pad(self.start, (0, missing), value=tokens).view(blocks, _BLOCK)  # what fills up is seen by nobody
        end = F.pad(self.end, (0, missing)).view(blocks, _BLOCK)
        first = torch.arange(0, blocks * _BLOCK, _BLOCK, device=start.device)[:, None]
        last = first + (_BLOCK - 1)
        some = (start.amin(1) <= last) & (end.amax(1) > first)
        every = (start.amax(1) <= first) & (end.amin(1) > last)
        if window is not None:
            position = F.pad(self.position, (0, missing)).view(blocks, _BLOCK)
            low, high = position.amin(1), position.amax(1)
            some &= (low[:, None] < high + window) & (low < high[:, None] + window)
            every &= (high[:, None] < low + window) & (high < low[:, None] + window)
        return BlockMask.from_kv_blocks(
            *_listed(some & ~every),
            *_listed(every),
            BLOCK_SIZE=_BLOCK,
            mask_mod=self.mask_function(window),
            seq_lengths=(tokens, tokens),
        )


def interval_layout(plan: PackingPlan, *, causal: bool) -> IntervalLayout:
    """Finds the intervals of a plan.

    Args:
        plan: The row.
        causal: Whether a token sees only what comes before it.
    """
    start, end = seen_by(plan, causal=causal)
    return IntervalLayout(start, end, torch.tensor(plan.position_ids, dtype=torch.int32))


def seen_by(plan: PackingPlan, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Returns for each token the first row index that sees it and the one after the last, [tokens] int32 each.

    Args:
        plan: The row.
        causal: Whether a token sees only what comes before it.
    """
    ends = [run.start + run.length for run in plan.runs]
    for number in reversed(range(len(plan.runs))):  # children before their parents
        parent = plan.runs[number].parent
        if parent != ROOT:
            ends[parent] = max(ends[parent], ends[number])
    lengths = torch.tensor([run.length for run in plan.runs])
    starts = torch.tensor([run.start for run in plan.runs], dtype=torch.int32).repeat_interleave(lengths)
    return (
        torch.arange(len(plan.ids), dtype=torch.int32) if causal else starts,
        torch.tensor(ends, dtype=torch.int32).repeat_interleave(lengths),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each row of [blocks, blocks] how many are set, and the columns with those first; [1, 1, ...]."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@functools.cache
def _kernel() -> Kernel:
    """Returns the compiled kernel; without compilation torch would fill a [tokens, tokens] matrix of scores.

    Sizes are dynamic, so one compilation serves rows of any length, which need not be filled up to whole blocks; short
    rows take the same kernel too, not the one made for generating text. It is one graph or an error, since torch's
    other way out is that matrix.
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
