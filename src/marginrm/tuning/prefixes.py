"""Says if a module may keep keys and values of prefixes across steps, by a probe, and how much memory a token takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from marginrm.encoding import EncodedGroup
from marginrm.forward.execution import Choice
from marginrm.forward.module import RewardModule, evaluating
from marginrm.forward.self_check import difference, groups_for, tolerance
from marginrm.prefix_cache import PrefixCache

_PROBE_TOKENS = 96  # of the longest sequence; half of them are a prefix
_ROOM = 2**20  # tokens; more than the probe has
_NOT_KEPT = "prefixes not kept across steps, since "


def try_it(module: RewardModule) -> Choice:
    """Scores a probe twice with a prefix cache, and compares the second time with the rewards without one.

    Args:
        module: Its `execution` is changed.
    """
    if module.architecture != "decoder":
        return Choice(False, "")
    obstacle = _obstacle(module)
    if obstacle is None:
        return Choice(True, "")
    module.execution = replace(module.execution, prefix_bytes=None)
    return Choice(False, _NOT_KEPT + obstacle)


def _obstacle(module: RewardModule) -> str | None:
    """Sets `prefix_bytes`; returns what speaks against a prefix cache."""
    if module.forward_path != "packed":
        return "rows are not packed"
    if module.length_boundary is not None:
        return "rotary embeddings depend on the length"
    if module.execution.attention == "blocked":
        return "deterministic mode computes whole sequences"
    groups = groups_for(module, _PROBE_TOKENS)
    cache = PrefixCache(_ROOM, token_bytes=1)
    try:
        with torch.inference_mode(), evaluating(module):
            expected: Tensor = module(module.collate(groups).to(module.device))
            _through(cache, module, groups)
            found = _through(cache, module, groups)
    except Exception as error:  # noqa: BLE001 - a model's code raises errors of any class, and works without a cache
        return f"a probe failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if found is None:
        return "its sequences are too short"
    worst = difference(found, expected)
    return None if worst <= tolerance(module) else f"rewards differ by {worst:.2g} in a probe"


def _through(cache: PrefixCache, module: RewardModule, groups: Sequence[EncodedGroup]) -> Tensor | None:
    """Scores groups with a cache and fills it; None if nothing of them was kept before."""
    with cache.step(groups, [""] * len(groups)) as step:
        rewards: Tensor = module(module.collate(groups, prefixes=step).to(module.device))
        if step.token_bytes:
            module.execution = replace(module.execution, prefix_bytes=step.token_bytes)
        step.commit()
    return rewards if step.use.hits else None
