"""Work without meaning, as much as is wanted: to warm up with, and to measure."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from marginrm.encoding import EncodedResponse, Encoder

_LENGTH = 256  # tokens of a sequence


def trial_groups(encoder: Encoder, tokens: int) -> list[list[EncodedResponse]]:
    """Makes groups of one response each that share nothing, of tokens that the model knows.

    Args:
        encoder: The model's.
        tokens: Of all groups together; rounded down to whole sequences, one at least.
    """
    pattern = encoder.encode("Are you there?", "Yes, I am.", "prompt_left")
    length = min(encoder.max_length, _LENGTH)
    times = -(-length // len(pattern.ids))
    ids = (pattern.ids * times)[:length]
    types = None if pattern.type_ids is None else (pattern.type_ids * times)[:length]
    generator = random.Random(0)  # noqa: S311 - nothing secret
    return [[EncodedResponse(tuple(generator.sample(ids, length)), types)] for _ in range(max(tokens // length, 1))]


def best_seconds(*ways: Callable[[], object], times: int = 5) -> list[float]:
    """Returns the least time that each of several ways takes; they take turns, so that a busy moment hits all alike.

    Args:
        ways: What to run; each returns when its work is done, on whatever device.
        times: How often each one runs. The first time also pays for the set-up.
    """
    best = [float("inf")] * len(ways)
    for _ in range(times):
        for number, way in enumerate(ways):
            started = time.perf_counter()
            way()
            best[number] = min(best[number], time.perf_counter() - started)
    return best
