"""Encoded pairs -> what one training step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marginrm.forward.batch import PackedBatch, PaddedBatch
from marginrm.forward.module import RewardModule
from marginrm_training.data.splits import EncodedPair


@dataclass(frozen=True, slots=True)
class PairBatch:
    """The pairs of one micro-step.

    Attributes:
        row: Chosen and rejected of each pair, one group a pair, laid out for the forward pass.
        given: Margins or strengths of the data, [pairs] float32, or None where the method reads none.
        places: `path:line` of each pair.
    """

    row: PackedBatch | PaddedBatch
    given: Tensor | None
    places: tuple[str, ...]

    def to(self, device: torch.device | str, **_: object) -> PairBatch:
        """Returns the batch on another device."""
        return replace(self, row=self.row.to(device), given=None if self.given is None else self.given.to(device))


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Makes batches for one module; the rewards come out as chosen, rejected, chosen, rejected, ..."""

    module: RewardModule

    def __call__(self, pairs: Sequence[EncodedPair]) -> dict[str, PairBatch]:
        """Lays pairs out; a margin that only some rows have is an error long before (see `data`)."""
        row = self.module.collate([[pair.chosen, pair.rejected] for pair in pairs])
        values = [pair.given for pair in pairs if pair.given is not None]
        if values and len(values) != len(pairs):
            raise ValueError(f"{len(values)} of {len(pairs)} pairs have a margin")
        given = torch.tensor(values, dtype=torch.float32) if values else None
        return {"batch": PairBatch(row, given, tuple(pair.pair.source for pair in pairs))}
