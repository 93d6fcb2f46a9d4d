"""Rewards that are the same to the bit in any company.

A reward depends on its neighbours by rounding only: kernels add up in another order when a row is longer. So the shapes
that kernels see are fixed. Linear layers go over tiles of so many tokens; attention goes over blocks of positions
(`block_layout`); rows are whole tiles, so that what is computed element by element is always cut into whole vectors.
Where a token lies in its tile must then make no difference, and whether it does is tried at load, on this machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from marginrm.encoding import EncodedResponse
from marginrm.errors import ModelError
from marginrm.forward.module import probe_groups

if TYPE_CHECKING:
    from marginrm.reward_model import RewardModel

TILE = 256  # tokens
_PROBE_TOKENS = (12, 2 * TILE)  # of the longest sequences; together they go over several tiles

_Groups = list[list[EncodedResponse]]


def make_deterministic(model: RewardModel) -> None:
    """Fixes the shapes of a model's kernels for scoring, and tries whether its rewards then stay to the bit.

    They stay for this model on this machine with these versions and threads; another machine may round otherwise.

    Args:
        model: Changed in place; it must not be compiled, since compiled kernels cut rows their own way.

    Raises:
        ModelError: The model runs on padded rows, or a reward still depends on its neighbours.
    """
    if model.forward_path == "padded":
        raise ModelError(
            f"deterministic: this model cannot be packed, and padded batches differ in shape. {model.forward_reason}."
        )
    module = model.module
    module.tile, module.attention_reason = TILE, "deterministic: attention in blocks, rows in tiles"
    for part in module.modules():
        if isinstance(part, nn.Linear | Conv1D):
            part.forward = _in_tiles(part.forward)  # type: ignore[method-assign]
    difference = _difference(model)
    if difference:
        raise ModelError(
            f"deterministic: a reward of this model still differs by {difference:.2g} with its neighbours in a probe on "
            f"{torch.get_num_threads()} threads. Try a power of two as OMP_NUM_THREADS, another dtype, or go without."
        )


def _in_tiles(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a layer's forward pass, tile by tile; it must treat each token by itself."""

    def apply(inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        filled = F.pad(rows, (0, 0, 0, -len(rows) % TILE))
        results = torch.cat([forward(tile) for tile in torch.split(filled, TILE)])
        return results[: len(rows)].view(*inputs.shape[:-1], -1)

    return apply


def _difference(model: RewardModel) -> float:
    """Returns the largest difference of a reward between several companies; 0 if all bits are the same, NaN if one is."""
    vocabulary, longest = model.module.base.config.vocab_size, model.encoder.max_length
    groups = [group for size in _PROBE_TOKENS for group in probe_groups(vocabulary, min(longest, size))]
    expected = [model.forward([[response]])[0] for group in groups for response in group]
    differences = [0.0]
    for company in _companies(groups):
        rewards = iter(model.forward([[response for _, response in group] for group in company]))
        differences += [abs(next(rewards) - expected[number]) for group in company for number, _ in group]
    return max(differences, key=lambda difference: (math.isnan(difference), difference))


def _companies(groups: _Groups) -> Sequence[list[list[tuple[int, EncodedResponse]]]]:
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
