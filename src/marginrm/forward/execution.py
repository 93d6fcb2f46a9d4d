"""How a module computes on this machine, and why: one frozen value that collate and forward read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Attention = Literal["gathered", "matmul", "amx", "flex", "blocked"]


class Choice(NamedTuple):
    """What became of one optimisation.

    Attributes:
        taken: Whether the module uses it now.
        reason: Why, in words for `forward_reason`; empty if it was not tried.
    """

    taken: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Execution:
    """How packed rows are computed. The default is exact for every packed module, on any device, with gradients.

    Attributes:
        device: The type of device that this was chosen for. On another, attention is `gathered`.
        attention: The backend: padded calls over gathered sequences, the same with matrix products, a kernel for
            processors with matrix tiles (AMX), FlexAttention, or blocks of fixed shape.
        splits_prefix: Whether attention to a long shared prefix is computed apart and merged.
        last_layer: Whether the last layer computes all tokens, or only those that rewards are read at.
        weights: Whether linear layers use their own weights or weights packed for a kernel.
        compiled: Whether the parts between the matrix products run through `torch.compile`.
        prefix_bytes: Memory of one token's keys and values, where prefixes may be kept across steps; None where not.
        tile: Row lengths are filled to a multiple of this many tokens in deterministic mode; None otherwise.
        reasons: Why, one sentence part for each optimisation that was tried.

    Raises:
        ValueError: The combination is not legal.
    """

    device: str = "cpu"
    attention: Attention = "gathered"
    splits_prefix: bool = False
    last_layer: Literal["whole", "reward_tokens"] = "whole"
    weights: Literal["plain", "packed"] = "plain"
    compiled: bool = False
    prefix_bytes: int | None = None
    tile: int | None = None
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._require(
            self.device == "cpu" or self.attention not in {"matmul", "amx"}, "matmul and AMX attention are for CPUs"
        )
        self._require(self.device == "cpu" or self.weights == "plain", "packed weights are for CPUs")
        # Only CPU kernels return the log-sum-exp that merges a prefix with the rest.
        gathers = self.device == "cpu" and self.attention in {"gathered", "matmul", "amx"}
        self._require(gathers or not self.splits_prefix, "only gathered attention on CPUs splits prefixes")
        self._require(
            (self.tile is None) == (self.attention != "blocked"), "blocked attention needs tiles, and only it"
        )
        # Deterministic mode fixes the shapes of all kernels; each of these would choose shapes by itself.
        fixed = self.last_layer == "whole" and self.weights == "plain" and not self.compiled and not self.prefix_bytes
        self._require(self.tile is None or fixed, "deterministic mode takes no other optimisation")

    @staticmethod
    def _require(legal: bool, rule: str) -> None:
        if not legal:
            raise ValueError(f"This execution is not legal: {rule}.")

    def because(self, reason: str) -> Execution:
        """Returns the same with one more reason; an empty one adds nothing."""
        return replace(self, reasons=(*self.reasons, reason)) if reason else self
