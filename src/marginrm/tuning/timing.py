"""Timing, and synthetic groups for warm-up and timing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from marginrm.encoding import EncodedResponse, Encoder

_LENGTH = 256  # tokens of a sequence


def trial_groups(encoder: Encoder, tokens: int, length: int = _LENGTH) -> list[list[EncodedResponse]]:
    """Makes groups of one response each that share nothing, of tokens that the model knows.

    Args:
        encoder: The model's encoder.
        tokens: Tokens of all groups together; rounded down to whole sequences, at least one.
        length: Tokens of a sequence; fewer where the model takes no more.
    """
    pattern = encoder.encode("Are you there?", "Yes, I am.", "prompt_left")
    length = min(encoder.max_length, length)
    times = -(-length // len(pattern.ids))
    ids = (pattern.ids * times)[:length]
    types = None if pattern.type_ids is None else (pattern.type_ids * times)[:length]
    generator = random.Random(0)  # noqa: S311 - not a secret
    return [[EncodedResponse(tuple(generator.sample(ids, length)), types)] for _ in range(max(tokens // length, 1))]


def best_seconds(*functions: Callable[[], object], times: int = 5) -> list[float]:
    """Returns the least time that each function takes; they alternate, so that a busy moment affects all alike.

    Args:
        functions: Each returns when its work is done, on any device.
        times: Number of runs of each. The first run also pays for the set-up.
    """
    best = [float("inf")] * len(functions)
    for _ in range(times):
        for number, function in enumerate(functions):
            best[number] = min(best[number], timed(function))
    return best


def timed(function: Callable[[], object]) -> float:
    """Returns the seconds that a function takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
