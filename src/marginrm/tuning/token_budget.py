"""The token budget of a forward pass on this machine, found by measuring.

A larger step shares more: fewer groups are split and compute their prompt twice. But a request that arrives while a step
runs has to wait for it. So the budget grows, by doubling, to the device's default while a step takes seconds only, and
beyond that while tokens get cheaper. Where two sizes take long, the others are not run but extrapolated: time is a fixed
part and a part in proportion to the tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from marginrm.encoding import EncodedResponse, Encoder
from marginrm.tuning.timing import timed, trial_groups

LONGEST_STEP = 20.0  # seconds
_REACH = 4  # the first budget tried is the default divided by this, and the last one the default times this
_BRIEF = 1.0  # seconds; steps that take less are timed twice
_LONG = 0.25  # seconds of the first step from which on larger ones may be extrapolated
_CHEAPER = 1.25  # beyond the default, a doubled budget must give this many times the tokens per second

_log = logging.getLogger(__name__)


def default_token_budget(device: torch.device) -> int:
    """Returns the tokens of a forward pass where they are neither measured nor set.

    It is enough for matrix products to run at full rate, and little enough for activations to stay small beside the
    weights.
    """
    return 16384 if device.type == "cuda" else 4096


def measure_token_budget(
    forward: Callable[[Sequence[Sequence[EncodedResponse]]], object], encoder: Encoder, default: int
) -> int:
    """Returns the token budget that suits this machine, after nine forward passes at most.

    Args:
        forward: Runs one forward pass over some groups.
        encoder: The model's encoder.
        default: The device's default, in tokens.
    """
    taken: dict[int, float] = {}

    def seconds(tokens: int) -> float:
        groups = trial_groups(encoder, tokens)
        taken[tokens] = timed(lambda: forward(groups))
        if taken[tokens] < _BRIEF:  # the first pass also sets things up, and brief ones vary
            taken[tokens] = min(taken[tokens], timed(lambda: forward(groups)))
        return taken[tokens]

    budget = choose_token_budget(seconds, default)
    shown = ", ".join(f"{tokens:,} tokens in {time * 1e3:,.0f} ms" for tokens, time in taken.items())
    _log.info("Steps of up to %s tokens (%s)", f"{budget:,}", shown)
    return budget


def choose_token_budget(seconds: Callable[[int], float], default: int) -> int:
    """Returns the budget by the module's rule.

    Args:
        seconds: Runs a forward pass over so many tokens, and returns how long it took.
        default: The device's default, in tokens.
    """
    size = default // _REACH
    took = seconds(size)
    while size < _REACH * default and 2 * took <= LONGEST_STEP:
        try:
            doubled = seconds(2 * size)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            break
        if size < default and _clear(size, took, doubled, default):
            return default
        if doubled > LONGEST_STEP or (size >= default and 2 * took < _CHEAPER * doubled):
            break
        size, took = 2 * size, doubled
    return size


def _clear(size: int, took: float, doubled: float, default: int) -> bool:
    """Returns whether two long steps say clearly that the default's step takes seconds, and a larger one pays nothing."""
    fixed, proportional = 2 * took - doubled, (doubled - took) * default / size
    if took < _LONG or fixed + proportional > LONGEST_STEP / 2:
        return False
    return 2 * (fixed + proportional) < (1 + _CHEAPER) / 2 * (fixed + 2 * proportional)


def out_of_memory(error: RuntimeError) -> bool:
    """Returns whether an error of torch says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # CPUs raise the latter
