"""Products of bfloat16 rows with weights in tiles, by the kernel `products.cpp`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from marginrm.amx.kernels import load_kernels

_TILE, _PANEL, _STEP = 16, 32, 32  # columns of a tile and of a panel, numbers of a step
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Product(ctypes.Structure):
    """`Product` in the kernel's source, field by field."""

    _fields_ = (
        ("rows", _POINTER),
        *((name, _INT) for name in ("step", "count", "in", "out")),
        *((name, _POINTER) for name in ("weights", "bias", "result")),
        ("threads", _INT),
    )


def pack(weight: Tensor) -> Tensor:
    """Returns a copy of weights in the order in which the kernel reads them.

    Args:
        weight: bfloat16, [out, in].

    Returns:
        [panels of 32 columns, steps of 32 numbers, 1024], filled with zeros.
    """
    columns, numbers = weight.shape
    filled = F.pad(weight, (0, -numbers % _STEP, 0, -columns % _PANEL))
    tiles = filled.view(-1, _PANEL // _TILE, _TILE, filled.shape[1] // _STEP, _STEP // 2, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(tiles), -1, _PANEL * _STEP)


def multiply(weights: Tensor, bias: Tensor | None, inputs: Tensor, out_features: int) -> Tensor:
    """Returns inputs times weights plus bias, [..., out]; sums are float32.

    A row's result does not depend on the rows beside it, to the bit.

    Args:
        weights: As `pack` gives them.
        bias: bfloat16, [out].
        inputs: bfloat16, [..., in].
        out_features: Number of columns.

    Raises:
        TypeError: Inputs, weights or bias have another dtype.
        ValueError: Their sizes do not match.
        torch.OutOfMemoryError: There is no memory for a packed chunk of rows.
    """
    given = [inputs, weights] if bias is None else [inputs, weights, bias]
    if any(one.dtype != torch.bfloat16 for one in given):
        raise TypeError(f"the kernel multiplies bfloat16, and got {', '.join(str(one.dtype) for one in given)}.")
    packed = (-(-out_features // _PANEL), -(-inputs.shape[-1] // _STEP), _PANEL * _STEP)
    if weights.shape != packed or (bias is not None and bias.shape != (out_features,)):
        sizes = ", ".join(str(list(one.shape)) for one in given)
        raise ValueError(f"inputs, weights and bias of sizes {sizes} do not give {out_features} columns.")
    rows = inputs.reshape(-1, inputs.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    bias = None if bias is None else bias.contiguous()
    result = rows.new_empty(len(rows), out_features)
    call = _Product(
        *(rows.data_ptr(), rows.stride(0), len(rows), rows.shape[1], out_features),
        *(weights.data_ptr(), None if bias is None else bias.data_ptr(), result.data_ptr()),
        torch.get_num_threads(),
    )
    if load_kernels().multiply(ctypes.byref(call)):
        raise torch.OutOfMemoryError("a product has no memory for its packed rows")
    return result.view(*inputs.shape[:-1], out_features)
