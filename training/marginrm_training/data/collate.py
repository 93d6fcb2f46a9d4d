"""Encoded pairs -> the batch of one micro-step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marginrm.forward.batch import Batch
from marginrm.forward.module import RewardModule
from marginrm_training.data.splits import EncodedPair


@dataclass(frozen=True, slots=True)
class PairBatch:
    """The pairs of one micro-step.

    Attributes:
        row: Chosen and rejected of each pair, one group a pair, laid out for the forward pass.
        labels: The data's margins or strengths, [pairs] float32, or None where the method reads none.
        sources: `path:line` of each pair.
    """

    row: Batch
    labels: Tensor | None
    sources: tuple[str, ...]

    def to(self, device: torch.device | str, **_: object) -> PairBatch:
        """Returns the batch on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, row=self.row.to(device), labels=labels)


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Makes batches for one module, whose rewards are in the order chosen, rejected, chosen, rejected, ..."""

    module: RewardModule

    def __call__(self, pairs: Sequence[EncodedPair]) -> dict[str, PairBatch]:
        """Lays pairs out for the forward pass.

        Raises:
            ValueError: Only some of the pairs have a label; `data.splits` refuses such rows with their place.
        """
        row = self.module.collate([[pair.chosen, pair.rejected] for pair in pairs])
        values = [pair.label for pair in pairs if pair.label is not None]
        if values and len(values) != len(pairs):
            raise ValueError(f"{len(values)} of {len(pairs)} pairs have a label")
        labels = torch.tensor(values, dtype=torch.float32) if values else None
        return {"batch": PairBatch(row, labels, tuple(pair.pair.source for pair in pairs))}
