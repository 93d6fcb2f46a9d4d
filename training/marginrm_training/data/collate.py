"""Encoded pairs -> the batch of one micro-step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marginrm.calibration import Floats
from marginrm.forward.batch import Batch
from marginrm.forward.module import RewardModule
from marginrm_training.data.splits import EncodedPair
from marginrm_training.method.style import style_differences


@dataclass(frozen=True, slots=True)
class PairBatch:
    """The pairs of one micro-step.

    Attributes:
        row: Chosen and rejected of each pair, one group a pair, laid out for the forward pass.
        labels: The data's margins or strengths, [pairs] float32, or None where the method reads none.
        sources: `path:line` of each pair.
        style: style(chosen) - style(rejected), [pairs, features] float32, or None without style control.
    """

    row: Batch
    labels: Tensor | None
    sources: tuple[str, ...]
    style: Tensor | None = None

    def to(self, device: torch.device | str, **_: object) -> PairBatch:
        """Returns the batch on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        style = None if self.style is None else self.style.to(device)
        return replace(self, row=self.row.to(device), labels=labels, style=style)


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Makes batches for one module, whose rewards are in the order chosen, rejected, chosen, rejected, ...

    Attributes:
        module: The module.
        style: Whether batches have the pairs' differences in style.
    """

    module: RewardModule
    style: bool = False

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
        style = torch.from_numpy(_style(pairs)).float() if self.style else None
        return {"batch": PairBatch(row, labels, tuple(pair.pair.source for pair in pairs), style)}


def _style(pairs: Sequence[EncodedPair]) -> Floats:
    return style_differences((pair.pair.chosen, pair.pair.rejected) for pair in pairs)
