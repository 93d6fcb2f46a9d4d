"""Batch-invariant rewards: bit-identical whatever else is scored in the same forward pass.

A reward depends on its neighbours by rounding only: kernels add in another order when a row is longer. So the shapes
that kernels get are fixed. Linear layers run over tiles of a fixed number of tokens; attention runs over blocks of
positions (`attention.blocked`); rows are whole tiles, so that element-wise kernels always process whole vectors. The
place of a token in its tile must then not change its bits: a probe at load checks that, on this machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from marginrm.attention.layout import UnsupportedAttentionError
from marginrm.encoding import EncodedResponse
from marginrm.errors import ModelError
from marginrm.forward.execution import Choice
from marginrm.forward.module import RewardModule, evaluating
from marginrm.forward.self_check import groups_for

TILE = 256  # tokens
_PROBE_TOKENS = (12, 2 * TILE)  # tokens of the longest sequences; together they fill several tiles

_Groups = Sequence[Sequence[EncodedResponse]]
_Forward = Callable[[_Groups], list[float]]


def try_it(module: RewardModule) -> Choice:
    """Fixes the shapes of a module's kernels for scoring, and checks that its rewards are then batch-invariant.

    They are for this model on this machine with these versions and threads; another machine may round differently. It
    is tried only on request, so a failure is an error.

    Args:
        module: Changed in place; it must be neither compiled nor have packed weights.

    Raises:
        ModelError: The model is not packed, or a reward still depends on its neighbours.
    """
    if module.forward_path != "packed":
        raise ModelError(
            f"deterministic: this model cannot be packed, and padded batches differ in shape. {module.forward_reason}."
        )
    apply(module)
    try:
        with evaluating(module):
            worst = largest_difference(lambda groups: _rewards(module, groups), _probe(module))
    except UnsupportedAttentionError as error:
        undo(module)
        raise ModelError(f"deterministic: {error}, and this model asks for it. Go without.") from error
    if worst:
        undo(module)
        raise ModelError(
            f"deterministic: a reward of this model still differs by {worst:.2g} with its neighbours in a probe on "
            f"{torch.get_num_threads()} threads. Try a power of two as OMP_NUM_THREADS, another dtype, or go without."
        )
    return Choice(True, "deterministic: attention in blocks, rows in tiles")


def apply(module: RewardModule) -> None:
    """Runs linear layers in tiles and attention in blocks."""
    for part in module.modules():
        if isinstance(part, nn.Linear | Conv1D):
            part.forward = _Tiled(part.forward)  # type: ignore[method-assign]
    module.execution = replace(module.execution, attention="blocked", tile=TILE)


def undo(module: RewardModule) -> None:
    """Gives linear layers their own forward pass back, if it was replaced."""
    for part in module.modules():
        if isinstance(part.forward, _Tiled):
            part.forward = part.forward.whole
    if module.execution.tile:
        module.execution = replace(module.execution, attention="gathered", tile=None)


class _Tiled:
    """A layer's forward pass, tile by tile; the layer must treat each token by itself."""

    def __init__(self, whole: Callable[[Tensor], Tensor]) -> None:
        self.whole = whole

    def __call__(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        filled = F.pad(rows, (0, 0, 0, -len(rows) % TILE))
        results = torch.cat([self.whole(tile) for tile in torch.split(filled, TILE)])
        return results[: len(rows)].view(*inputs.shape[:-1], -1)


def _rewards(module: RewardModule, groups: _Groups) -> list[float]:
    with torch.inference_mode():
        rewards: list[float] = module(module.collate(groups).to(module.device)).tolist()
        return rewards


def _probe(module: RewardModule) -> list[list[EncodedResponse]]:
    return [group for size in _PROBE_TOKENS for group in groups_for(module, size)]


def largest_difference(forward: _Forward, groups: _Groups) -> float:
    """Returns the largest difference of a reward between batch compositions; 0 if all bits agree, NaN if one is.

    Args:
        forward: Computes the rewards of some groups together.
        groups: What to compute, alone and in several arrangements.
    """
    expected = [forward([[response]])[0] for group in groups for response in group]
    differences = [0.0]
    for composition in _compositions(groups):
        rewards = iter(forward([[response for _, response in group] for group in composition]))
        differences += [abs(next(rewards) - expected[number]) for group in composition for number, _ in group]
    return max(differences, key=lambda difference: (math.isnan(difference), difference))


def _compositions(groups: _Groups) -> Sequence[list[list[tuple[int, EncodedResponse]]]]:
    """Returns the groups in several arrangements, each response with its number."""
    numbers = itertools.count()
    numbered = [[(next(numbers), response) for response in group] for group in groups]
    alone = [[one] for group in numbered for one in group]
    return (
        numbered,
        [group[::-1] for group in numbered[::-1]],
        alone[1:] + alone[:1],
        numbered[1:],
        [g[:1] for g in numbered],
    )
