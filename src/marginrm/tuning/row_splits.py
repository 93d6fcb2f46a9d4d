"""Products of oneDNN that leave a core idle are computed in two parts.

For some numbers of rows, oneDNN (as of torch 2.13) divides a product of few output columns badly among two threads: on a
Xeon with AMX, [1216, 2048] x [2048, 1024] ran at half the rate of [1152, 2048] x [2048, 1024]. Each shape of weights is
timed at each number of rows when a model is loaded. A table says where two parts are faster than the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from marginrm.allocator import give_memory_back
from marginrm.tuning.timing import best_seconds, timed

_UNIT = 64  # rows; packed rows are filled to a multiple of it
_MOST_ROWS = 2_048  # longer products have enough blocks for the threads of a laptop
_MOST_WEIGHTS = 2**22  # and so do those of larger weights
_ROUNDS = 2  # sweeps over the numbers of rows after the first, so that a busy moment affects one of them
_SECONDS = 3.0  # for all shapes of a model; longer products are left whole from there on
_WORTH_IT = 1.15  # speed relative to the whole product from which on two parts are taken

Product = Callable[[Tensor], Tensor]

# Rows of the first part, for each number of units, or 0 for the whole. It belongs to (dtype, in, out) of the weights.
_tables: dict[tuple[torch.dtype, int, int], tuple[int, ...]] = {}


def measure(products: Mapping[tuple[torch.dtype, int, int], Product]) -> bool:
    """Times products that were not timed before in this process.

    Args:
        products: For dtype, input and output size of weights a function of [rows, in].

    Returns:
        Whether some products are computed in parts.
    """
    if torch.get_num_threads() == 1:
        return False
    new = {key: product for key, product in products.items() if key not in _tables}
    for key, product in new.items():
        small = key[1] * key[2] <= _MOST_WEIGHTS
        _tables[key] = _table(_sweep(product, key[0], key[1], _SECONDS / len(new))) if small else ()
    if new:
        give_memory_back()  # of products of many sizes
    return any(any(_tables[key]) for key in products)


def in_parts(product: Product, inputs: Tensor, out_features: int) -> Tensor:
    """Computes a product, in two parts where that is faster.

    Args:
        product: Of any number of rows, [rows, in] to [rows, out].
        inputs: [..., in].
        out_features: Output size.
    """
    table = _tables.get((inputs.dtype, inputs.shape[-1], out_features), ())
    rows = inputs.numel() // inputs.shape[-1]
    units = -(-rows // _UNIT)
    first = table[units] if units < len(table) else 0
    if not first:
        return product(inputs)
    flat = inputs.reshape(rows, -1)
    parts = torch.cat([product(flat[:first]), product(flat[first:])])
    return parts.view(*inputs.shape[:-1], out_features)


def _sweep(product: Product, dtype: torch.dtype, in_features: int, seconds: float) -> list[float]:
    """Returns the least seconds of a product of 0, 1, 2, ... units of rows, as far as the time allows."""
    inputs = torch.randn(_MOST_ROWS, in_features).to(dtype)
    products: list[Callable[[], Tensor]] = []
    spent = 0.0
    for rows in range(_UNIT, _MOST_ROWS + 1, _UNIT):
        products.append(partial(product, inputs[:rows]))
        spent += (1 + _ROUNDS) * timed(products[-1])  # the first run also pays for the set-up
        if spent > seconds:
            products.pop()
            break
    return [0.0, *best_seconds(*products, times=_ROUNDS)]


def _table(seconds: list[float]) -> tuple[int, ...]:
    """Returns the rows of the first part for each number of units, or 0 for the whole."""
    table = [0] * len(seconds)
    for units in range(2, len(seconds)):
        first = min(range(1, units), key=lambda part: seconds[part] + seconds[units - part])
        if seconds[units] > _WORTH_IT * (seconds[first] + seconds[units - first]):
            table[units] = first * _UNIT
    return tuple(table)
