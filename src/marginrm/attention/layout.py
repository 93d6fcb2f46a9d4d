"""What every way of going over a packed row with attention offers."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from marginrm.packing import PackingPlan


class Layout(Protocol):
    """How attention goes over one row: found once per row, the same for every layer."""

    def to(self, device: torch.device) -> Self:
        """Returns the layout on another device."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float, window: int | None
    ) -> Tensor:
        """Computes a layer's attention over the row.

        Args:
            query: [1, heads, tokens, head size].
            key: [1, key heads, tokens, head size]; key heads divide heads.
            value: As `key`.
            scale: Factor on the dot products; None for 1 / sqrt(head size).
            dropout: Attention dropout, for training.
            window: Tokens see each other only at a distance below this one; None for no window.

        Returns:
            [1, tokens, heads, head size].

        Raises:
            UnsupportedAttentionError: For what this layout does not know.
        """


class LayoutFn(Protocol):
    """Finds how attention goes over a row."""

    def __call__(self, plan: PackingPlan, *, causal: bool) -> Layout:
        """Lays a plan out; causal for decoders."""
