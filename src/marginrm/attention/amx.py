"""Attention by a kernel of our own, on processors with matrix tiles (AMX): nothing is gathered, padded or merged.

The kernel (`amx/attention.cpp`) walks a row's runs. Each token's queries read the keys of its own run, of the runs above
it and of the cached prefix where they lie. Scores and sums are float32, as in PyTorch's fused kernel. What it does not
compute (windows, soft-capping, sinks, dropout, gradients, other dtypes) goes to gathered attention.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from marginrm.amx.kernels import load_kernels
from marginrm.attention.gathered import GatheredLayout, gathered_layout
from marginrm.attention.layout import AttentionOptions, KeysAndValues
from marginrm.packing import Ints, PackingPlan

_LARGEST_HEAD = 256  # as in the kernel
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Call(ctypes.Structure):
    """`Call` in the kernel's source, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "key", "value")),
        *((f"{name}_{step}", _INT) for name in ("query", "key", "value") for step in ("token", "head")),
        ("result", _POINTER),
        *((name, _INT) for name in ("heads", "key_heads", "size", "value_size", "runs")),
        *((name, _POINTER) for name in ("start", "length", "parent", "cached")),
        ("prefixes", _INT),
        *((f"prefix_{name}", _POINTER) for name in ("key", "value", "strides", "length")),
        *((name, _INT) for name in ("causal", "threads")),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True)
class TileLayout:
    """The runs of a row, as the kernel reads them.

    Attributes:
        plan: The row.
        runs: Start, length, parent and cached prefix of each run, [4, runs].
        prefix_lengths: Tokens of each cached prefix, [prefixes].
        longest: Tokens of the longest sequence, its cached prefix included.
        split_from: As for `gathered_layout`, where the kernel does not do.
    """

    plan: PackingPlan
    runs: Ints
    prefix_lengths: Ints
    longest: int
    split_from: int | None

    def to(self, device: torch.device) -> TileLayout:
        """Returns the layout; modules take it on CPUs only.

        Raises:
            ValueError: The device is not a CPU.
        """
        if device.type != "cpu":
            raise ValueError(f"device = {device}: the kernel for matrix tiles runs on CPUs.")
        return self

    @cached_property
    def gathered(self) -> GatheredLayout:
        """The row for calls that the kernel does not compute."""
        return gathered_layout(self.plan, split_from=self.split_from)

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
            torch.OutOfMemoryError: There is no memory for the packed keys and values.
        """
        scale = query.shape[-1] ** -0.5 if options.scale is None else options.scale
        if not self._computes(query, value, options, scale):
            return self.gathered.attend(query, key, value, options, cached)
        query, key, value = (one if one.stride(-1) == 1 else one.contiguous() for one in (query, key, value))
        cached = [KeysAndValues(*(one if one.stride(-1) == 1 else one.contiguous() for one in kept)) for kept in cached]
        result = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
        strides = [(*_steps(kept.key), *_steps(kept.value)) for kept in cached]
        prefix_strides = np.array(strides, np.int64).ravel()
        pointers = _POINTER * len(cached)
        call = _Call(
            *(one.data_ptr() for one in (query, key, value)),
            *(step for one in (query, key, value) for step in _steps(one[0])),
            result.data_ptr(),
            *(query.shape[1], key.shape[1], query.shape[3], value.shape[3], self.runs.shape[1]),
            *(row.ctypes.data for row in self.runs),
            len(cached),
            ctypes.addressof(keys := pointers(*(kept.key.data_ptr() for kept in cached))),
            ctypes.addressof(values := pointers(*(kept.value.data_ptr() for kept in cached))),
            prefix_strides.ctypes.data,
            self.prefix_lengths.ctypes.data,
            *(int(self.plan.causal), torch.get_num_threads()),
            scale * math.log2(math.e),  # its exponentials are powers of two
        )
        failed = load_kernels().attend(ctypes.byref(call))
        del keys, values  # the kernel has read them
        if failed:
            raise torch.OutOfMemoryError("attention has no memory for its packed keys and values")
        return result

    def _computes(self, query: Tensor, value: Tensor, options: AttentionOptions, scale: float) -> bool:
        return (
            options.plain
            and not options.dropout
            and (options.window is None or options.window >= self.longest)
            and scale > 0
            and query.dtype == torch.bfloat16
            and max(query.shape[-1], value.shape[-1]) <= _LARGEST_HEAD
            and not (torch.is_grad_enabled() and query.requires_grad)
        )


def tile_layout(plan: PackingPlan, *, split_from: int | None = None) -> TileLayout:
    """Prepares a plan for the kernel.

    Args:
        plan: The row.
        split_from: As for `gathered_layout`, where the kernel does not do.
    """
    runs = np.array([(run.start, run.length, run.parent, run.cached) for run in plan.runs], np.int64).T.copy()
    longest = max(run.offset + run.length for run in plan.runs)
    return TileLayout(plan, runs, np.array(plan.cached, np.int64), longest, split_from)


def _steps(tensor: Tensor) -> tuple[int, int]:
    """Returns the strides of tokens and of heads of [heads, tokens, size]."""
    return tensor.stride(1), tensor.stride(0)
