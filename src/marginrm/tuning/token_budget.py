"""How many tokens one forward pass should compute here, found by trying.

A larger step shares more: fewer groups are cut and compute their prompt twice. But whoever comes while it runs waits for
it. So the budget grows, by doubling, to what is usual on the device as long as a step takes seconds only, and beyond
that as long as tokens get cheaper by it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from marginrm.encoding import EncodedResponse
from marginrm.reward_model import RewardModel, usual_token_budget
from marginrm.tuning.timing import trial_groups

LONGEST_STEP = 20.0  # seconds
_REACH = 4  # the first budget tried is the usual one divided by this, and the last one it times this
_BRIEF = 2.0  # seconds
_CHEAPER = 1.25  # beyond the usual budget a doubled one gives so many times the tokens per second, or is not taken

_log = logging.getLogger(__name__)


def measure_token_budget(model: RewardModel) -> int:
    """Sets a model's token budget to what suits this machine, in ten forward passes at most.

    Args:
        model: Its `token_budget` is changed.

    Returns:
        The budget, in tokens.
    """
    taken: dict[int, float] = {}

    def seconds(tokens: int) -> float:
        groups = trial_groups(model.encoder, tokens)
        taken[tokens] = _timed(model, groups)
        if taken[tokens] < _BRIEF:  # the very first pass also sets things up, and brief ones vary
            taken[tokens] = min(taken[tokens], _timed(model, groups))
        return taken[tokens]

    usual = usual_token_budget(model.module.device)
    model.token_budget = choose_token_budget(seconds, usual)
    shown = ", ".join(f"{tokens:,} tokens in {time * 1e3:,.0f} ms" for tokens, time in taken.items())
    _log.info("Model %r: steps of up to %s tokens (%s)", model.info.name, f"{model.token_budget:,}", shown)
    return model.token_budget


def _timed(model: RewardModel, groups: list[list[EncodedResponse]]) -> float:
    started = time.perf_counter()
    model.forward(groups)
    return time.perf_counter() - started


def choose_token_budget(seconds: Callable[[int], float], usual: int) -> int:
    """Returns the budget by the module's rule.

    Args:
        seconds: Runs a forward pass over so many tokens, and returns how long it took.
        usual: What is usual on the device.
    """
    size = usual // _REACH
    took = seconds(size)
    while size < _REACH * usual and 2 * took <= LONGEST_STEP:
        try:
            doubled = seconds(2 * size)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            break
        if doubled > LONGEST_STEP or (size >= usual and 2 * took < _CHEAPER * doubled):
            break
        size, took = 2 * size, doubled
    return size


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # the latter on CPUs
