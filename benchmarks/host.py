"""The cost of planning: microseconds of one core per computed token, before a forward pass can start.

    python -m benchmarks.host

It times the two parts apart: the plan of a row, and the whole batch (plan, tensors and attention layout).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from marginrm.attention.gathered import SPLIT_FROM, gathered_layout
from marginrm.encoding import EncodedGroup, EncodedResponse
from marginrm.forward.batch import pack
from marginrm.packing import plan_row

_REPEATS = 200
_MULTIPLE = 64  # tokens, as on CPUs
_SHAPES = {  # groups, responses each, tokens of the shared prefix and of each suffix
    "1 group, 800 + 16 x 128": (1, 16, 800, 128),
    "1 group, 14 + 16 x 307": (1, 16, 14, 307),
    "32 pairs, 20 + 2 x 300": (32, 2, 20, 300),
}


def groups_of(count: int, responses: int, prefix: int, suffix: int) -> list[EncodedGroup]:
    """Makes groups of random token ids, with one prefix for each group."""
    generator = np.random.default_rng(0)

    def some(length: int) -> list[int]:
        found: list[int] = generator.integers(5, 30_000, length).tolist()
        return found

    return [
        [EncodedResponse((*shared, *some(suffix))) for _ in range(responses)]
        for shared in (some(prefix) for _ in range(count))
    ]


def best_microseconds(function: Callable[[], object]) -> float:
    """Returns the least time of many calls."""
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return best * 1e6


def main() -> None:
    """Prints one line for each shape."""
    layout = partial(gathered_layout, split_from=SPLIT_FROM)
    print(f"{'shape':<26}{'tokens':>8}{'plan':>10}{'batch':>10}   us a computed token")
    for name, shape in _SHAPES.items():
        groups = groups_of(*shape)
        ids = [[response.array for response in group] for group in groups]
        plan = partial(plan_row, ids, causal=True, multiple=_MULTIPLE)
        batch = partial(pack, groups, causal=True, layout=layout, multiple=_MULTIPLE)
        tokens = len(plan().ids)
        planning, whole = (best_microseconds(function) / tokens for function in (plan, batch))
        print(f"{name:<26}{tokens:>8,}{planning:>10.3f}{whole:>10.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
