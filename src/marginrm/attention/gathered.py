"""Attention over a packed row as a few padded calls: the default backend, on any device and with gradients.

The tokens of each sequence are gathered from the row by index. Sequences of about one length form one call, padded on the right.
In a decoder causality hides the padding, so no mask is needed; tokens that two sequences share are read twice, and
their result is taken from the first one. Where several sequences share a long prefix, attention to it is computed
apart: all suffixes' queries against one copy of the prefix, without a mask, merged with the rest by their log-sum-exp.
That is exact: softmax over a union of keys is the mean of the parts' softmax, weighted by the parts' sums of
exponentials (as in FlashAttention, arXiv 2205.14135, section 3.1). A cached prefix is such a prefix, too: its keys and
values come from earlier steps, and only the tokens behind it are queries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from marginrm.attention.cpu_fused import FusedCPUAttention
from marginrm.attention.layout import AttentionOptions, KeysAndValues, UnsupportedAttentionError, additive
from marginrm.attention.matmul import masked_attention, matmul_attention
from marginrm.packing import ROOT, UNCACHED, Ints, PackingPlan

# A shorter prefix is cheaper to read again in each sequence than to merge.
SPLIT_FROM = 128
# Lengths are rounded up to a multiple of this: fused kernels pay for a ragged end with up to 40% of their time.
_UNIT = 32
# Sequences form one call if padding the shorter ones wastes at most this share of it.
_MAX_WASTE = 0.1


@dataclass(frozen=True, slots=True)
class PaddedCall:
    """One attention call: sequences padded to one length.

    Attributes:
        lengths: Real tokens of each sequence, [sequences].
        longest: Tokens of a sequence, padding included.
        prefix: Tokens of the prefix that all sequences also attend to; 0 for whole sequences.
        causal: Whether a token attends only to the tokens before it.
        cached: Index of the cached prefix that the prefix begins with, or `UNCACHED`.
        cached_tokens: Tokens of it; those of the prefix that are in the row come after them.
        masks: The masks made so far, by window and dtype.
    """

    lengths: Tensor
    longest: int
    prefix: int
    causal: bool
    cached: int = UNCACHED
    cached_tokens: int = 0
    masks: dict[tuple[int | None, torch.dtype], Tensor | None] = field(default_factory=dict, compare=False)

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.lengths.shape[0]

    @property
    def prefix_in_row(self) -> int:
        """Tokens of the prefix that are in the row."""
        return self.prefix - self.cached_tokens

    def to(self, device: torch.device) -> PaddedCall:
        """Returns the call on another device."""
        return replace(self, lengths=self.lengths.to(device), masks={})

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Returns the mask that is added to the scores, made once for all layers; None if causality is enough.

        Args:
            window: As in `AttentionOptions`.
            dtype: The dtype of the scores.

        Returns:
            [sequences or 1, 1, longest or 1, longest], or with a window [..., prefix + longest].
        """
        if (window, dtype) not in self.masks:
            self.masks[window, dtype] = additive(self._seen(window), dtype)
        return self.masks[window, dtype]

    def causal_mask(self, dtype: torch.dtype) -> Tensor:
        """Returns causality as a mask, [1, 1, longest, prefix + longest], for kernels that need one."""
        mask = self.mask(self.prefix + self.longest, dtype)  # a window that hides nothing
        assert mask is not None
        return mask

    def _seen(self, window: int | None) -> Tensor | None:
        if window is None and self.causal:
            return None
        keys = torch.arange(self.prefix + self.longest, device=self.lengths.device)
        queries = keys[self.prefix :]
        distance = queries[:, None] - keys[None, :]
        near = distance.abs() < (len(keys) if window is None else window)
        if self.causal:
            return (near & (distance >= 0))[None, None]
        real = keys[None, :] < self.lengths[:, None]
        if window is None:
            return None if bool(real.all()) else real[:, None, None]
        # Padding attends to itself, since a softmax over nothing is NaN.
        return (near & real[:, None, :] | (distance == 0))[:, None]


@dataclass(frozen=True, slots=True)
class GatheredLayout:
    """The calls over a row, with the row indices that they read and write.

    Attributes:
        calls: The calls.
        tokens: Row indices of the calls' sequences, end to end, [sum of sequences * longest].
        prefixes: Row indices of the calls' prefixes, end to end, [sum of prefix_in_row].
        order: Index of each row token's result among the results of all calls, [tokens].
        matmul: Whether causal calls without gradients are computed by `matmul_attention` instead of the fused kernel.
    """

    calls: tuple[PaddedCall, ...]
    tokens: Tensor
    prefixes: Tensor
    order: Tensor
    matmul: bool

    def to(self, device: torch.device) -> GatheredLayout:
        """Returns the layout on another device."""
        calls = tuple(call.to(device) for call in self.calls)
        tokens, prefixes, order = (part.to(device) for part in (self.tokens, self.prefixes, self.order))
        return GatheredLayout(calls, tokens, prefixes, order, self.matmul)

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
            UnsupportedAttentionError: A prefix of the row is computed apart, and the layer asks for dropout or for values
                of another size than keys.
        """
        if options.window is not None and options.window >= max(call.prefix + call.longest for call in self.calls):
            options = replace(options, window=None)
        # One gather for all calls: its gradient is one scatter, where a gather per call would fill a whole row each.
        sizes = [call.sequences * call.longest for call in self.calls]
        suffixes = [_gathered(tensor, self.tokens, sizes) for tensor in (query, key, value)]
        in_row = [call.prefix_in_row for call in self.calls]
        prefixes = [_gathered(tensor, self.prefixes, in_row) for tensor in (key, value)]
        results = [
            _run_call(call, suffix, _whole_prefix(call, prefix, cached), options, matmul=self.matmul)
            for call, suffix, prefix in zip(
                self.calls, zip(*suffixes, strict=True), zip(*prefixes, strict=True), strict=True
            )
        ]
        return torch.cat(results).index_select(0, self.order)[None]


def gathered_layout(plan: PackingPlan, *, split_from: int | None = None, matmul: bool = False) -> GatheredLayout:
    """Lays out a plan's sequences in as few calls as exactness and little padding allow.

    Args:
        plan: The row.
        split_from: Shared prefixes of at least this many tokens are computed apart, in decoders; None for never.
        matmul: As in `GatheredLayout`.
    """
    order = np.empty(len(plan.ids), np.int64)
    calls, tokens, prefixes = [], [], []
    base = 0
    for cached, prefix, sequences in _calls(plan, split_from if plan.causal else None):
        known = 0 if cached == UNCACHED else plan.cached[cached]
        lengths = [len(sequence) for sequence in sequences]
        longest = max(lengths)
        if plan.causal:
            longest += -longest % _UNIT
        places = np.zeros((len(sequences), longest), np.int64)  # padding reads token 0; its results are never taken
        for number, sequence in enumerate(sequences):
            first = base + number * longest
            places[number, : len(sequence)] = sequence
            order[sequence] = np.arange(first, first + len(sequence))
        base += places.size
        calls.append(
            PaddedCall(torch.tensor(lengths), longest, known + len(prefix), plan.causal, cached, cached_tokens=known)
        )
        tokens.append(places.ravel())
        prefixes.append(prefix)
    return GatheredLayout(
        tuple(calls),
        torch.from_numpy(np.concatenate(tokens)),
        torch.from_numpy(np.concatenate(prefixes)),
        torch.from_numpy(order),
        matmul,
    )


def sequences_of(plan: PackingPlan) -> list[Ints]:
    """Returns for each run the row indices from its sequence's first token in the row to the run's last."""
    found: list[Ints] = []
    for run in plan.runs:
        suffix = np.arange(run.start, run.stop)
        found.append(suffix if run.parent == ROOT else np.concatenate([found[run.parent], suffix]))
    return found


def _calls(plan: PackingPlan, split_from: int | None) -> Iterator[tuple[int, Ints, list[Ints]]]:
    """Yields the cached prefix, the prefix in the row and the sequences of each call.

    The sequences are suffixes of one prefix that they share in the row, or all that the row has of them.
    """
    found = sequences_of(plan)
    prefix_ends = _prefix_ends(plan, found, split_from)
    whole: dict[int, list[Ints]] = defaultdict(list)
    suffixes: dict[int, list[int]] = defaultdict(list)
    for leaf, run in prefix_ends.items():
        suffixes[run].append(leaf)
    # A shared prefix's own results come from a sequence like any other.
    for end in (*(end for end in plan.ends if end not in prefix_ends), *suffixes):
        whole[plan.runs[end].cached].append(found[end])
    for cached, alike in whole.items():
        for sequences in _of_like_length(alike):
            yield cached, np.empty(0, np.int64), sequences
    for run, leaves in suffixes.items():
        shared = _aligned(len(found[run]), split_from)
        for sequences in _of_like_length([found[leaf][shared:] for leaf in leaves]):
            yield plan.runs[run].cached, found[run][:shared], sequences


def _prefix_ends(plan: PackingPlan, found: Sequence[Ints], split_from: int | None) -> dict[int, int]:
    """Returns for each leaf that has one the run that ends its shared prefix: the one that saves most reading."""
    if split_from is None:
        return {}
    ancestors = {leaf: plan.ancestors(leaf) for leaf in plan.leaves}
    leaves_under = [0] * len(plan.runs)
    for above in ancestors.values():
        for run in above:
            leaves_under[run] += 1
    best: dict[int, int] = {}
    for leaf, above in ancestors.items():
        saved = {run: (leaves_under[run] - 1) * _aligned(len(found[run]), split_from) for run in above}
        end = max(saved, key=lambda run: saved[run], default=ROOT)
        if end != ROOT and saved[end]:
            best[leaf] = end
    return best


def _aligned(length: int, split_from: int | None) -> int:
    """Returns how much of a prefix is worth computing apart: none of a short one, whole units of a long one."""
    if split_from is None or length < split_from:
        return 0
    unit = min(_UNIT, split_from)
    return length // unit * unit


def _of_like_length(sequences: Sequence[Ints]) -> Iterator[list[Ints]]:
    """Yields sequences of about one length together, shortest first."""
    batch: list[Ints] = []
    filled = 0
    for sequence in sorted(sequences, key=len):
        if filled + len(sequence) < (1 - _MAX_WASTE) * len(sequence) * (len(batch) + 1):
            yield batch
            batch, filled = [], 0
        batch.append(sequence)
        filled += len(sequence)
    if batch:
        yield batch


def _gathered(tensor: Tensor, index: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Fetches tokens of [1, heads, tokens, head size] into one [tokens, heads, head size] per call."""
    return torch.split(tensor[0].transpose(0, 1).index_select(0, index), sizes)


def _whole_prefix(
    call: PaddedCall, in_row: tuple[Tensor, ...], cached: Sequence[KeysAndValues]
) -> tuple[Tensor | None, Tensor | None]:
    """Returns keys and values of a call's prefix, [1, key heads, prefix, size] each; None without one.

    Args:
        call: The call.
        in_row: Keys and values of the part that is in the row, [prefix_in_row, key heads, size].
        cached: As for `attend`. If the whole prefix is cached, it is not copied.
    """
    if not call.prefix:
        return None, None
    parts = [part.transpose(0, 1)[None] for part in in_row]
    if call.cached != UNCACHED:
        known = [part[None] for part in cached[call.cached]]
        parts = [torch.cat(both, 2) for both in zip(known, parts, strict=True)] if call.prefix_in_row else known
    key, value = parts
    return key, value


def _run_call(
    call: PaddedCall,
    suffix: tuple[Tensor, ...],
    prefix: tuple[Tensor | None, Tensor | None],
    options: AttentionOptions,
    *,
    matmul: bool,
) -> Tensor:
    """Returns the attention of one call, [sequences * longest, heads, value size]."""
    query, key, value = (part.view(call.sequences, call.longest, *part.shape[1:]).transpose(1, 2) for part in suffix)
    fused = query.device.type == "cpu" and not options.dropout and key.shape[-1] == value.shape[-1]
    if call.prefix_in_row and not fused:
        raise UnsupportedAttentionError("prefixes cannot be computed apart with dropout or values of another size")
    prefix_key, prefix_value = prefix
    mask = call.mask(options.window, query.dtype)
    causal = call.causal and mask is None
    gradients = torch.is_grad_enabled() and query.requires_grad
    if causal and not options.dropout and not gradients and (matmul or not options.plain):
        result = matmul_attention(query, key, value, prefix_key, prefix_value, options)
    elif not options.plain or (call.prefix and not causal):
        keys, values = _with_prefix(key, prefix_key), _with_prefix(value, prefix_value)
        result = masked_attention(query, keys, values, call.causal_mask(query.dtype) if causal else mask, options)
    elif (call.prefix and fused) or _backward_is_slow(query, value, options.dropout):
        result = FusedCPUAttention.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            query, key, value, prefix_key, prefix_value, mask, causal, options.scale
        )
    else:
        square = causal and not call.prefix
        result = F.scaled_dot_product_attention(
            query,
            _with_prefix(key, prefix_key),
            _with_prefix(value, prefix_value),
            attn_mask=mask if square or not causal else call.causal_mask(query.dtype),
            dropout_p=options.dropout,
            is_causal=square,
            scale=options.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return result.transpose(1, 2).flatten(0, 1)


def _with_prefix(suffix: Tensor, prefix: Tensor | None) -> Tensor:
    return suffix if prefix is None else torch.cat([prefix.expand(suffix.shape[0], -1, -1, -1), suffix], 2)


def _backward_is_slow(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Says if this is a backward pass of CPU kernels in half precision, which takes several times that of float32."""
    return (
        query.device.type == "cpu"
        and query.dtype != torch.float32
        and torch.is_grad_enabled()
        and query.requires_grad
        and not dropout
        and query.shape[-1] == value.shape[-1]
    )
