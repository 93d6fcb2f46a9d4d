"""The interface of an attention backend for packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from marginrm.packing import PackingPlan


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that this backend cannot compute exactly."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """A layer's own settings, as it passes them to its attention function.

    Attributes:
        scale: Factor on the dot products; None for 1 / sqrt(head size).
        dropout: Share of attention weights that training drops.
        window: Tokens attend to each other only at a distance below this one; None for no window.
        softcap: Scores become softcap * tanh(score / softcap) before the mask (Gemma 2, arXiv 2408.00118, section 2);
            None for plain scores.
        sinks: One more score for each head, [heads], that takes part in the softmax and has no value (gpt-oss); None for
            none.
    """

    scale: float | None = None
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether scores and softmax are the usual ones, as fused kernels compute them."""
        return self.softcap is None and self.sinks is None


class KeysAndValues(NamedTuple):
    """Keys and values of consecutive tokens in one attention call, as the attention function gets them (after RoPE).

    Attributes:
        key: [key heads, tokens, head size].
        value: [key heads, tokens, value size].
    """

    key: Tensor
    value: Tensor


class AttentionLayout(Protocol):
    """How attention is computed over one row: prepared once per row, the same for every layer."""

    def to(self, device: torch.device) -> Self:
        """Returns the layout on another device."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        cached: Sequence[KeysAndValues] = (),
    ) -> Tensor:
        """Computes a layer's attention over the row.

        Args:
            query: [1, heads, tokens, head size].
            key: [1, key heads, tokens, head size]; key heads divide heads.
            value: [1, key heads, tokens, value size].
            options: The layer's settings.
            cached: Keys and values of each of the plan's cached prefixes.

        Returns:
            [1, tokens, heads, value size].

        Raises:
            UnsupportedAttentionError: An option is outside of what this layout computes exactly.
        """


class LayoutFn(Protocol):
    """Prepares the attention of a row."""

    def __call__(self, plan: PackingPlan) -> AttentionLayout:
        """Returns the layout of a plan."""


def additive(seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns a boolean mask as one that is added to scores: 0 where it is true, minus infinity elsewhere."""
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
