"""The backbone's last layer, computed only at the tokens that rewards are read at.

Of the last layer's input every token's key and value is wanted, and all that comes after them of the tokens that are
read alone. So the layer runs on the whole row as far as its attention, is stopped there, and runs again on those tokens
with the keys and values of the first time. Nothing in it depends on the model's family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marginrm.forward.batch import PackedRow
from marginrm.forward.module import RewardModule, probe_difference, probe_rewards, probe_tolerance

# Tokens read are filled up to a multiple of this: oneDNN keeps a kernel for every number of rows.
_UNIT = 32


def shorten_last_layer(module: RewardModule) -> None:
    """Lets a module compute its last layer only where rewards are read, if its rewards stay what they were.

    Args:
        module: Changed in place; it notes what came of it in `last_layer_reason`. Heads that read every token need the
            whole layer.
    """
    if module.short_last_layer or module.forward_path == "padded" or module.reads_every_token:
        return
    layer = last_layer(module)
    if layer is None:
        module.last_layer_reason = "last layer whole, since the model does not say which modules its layers are"
        return
    training = module.training
    module.eval()
    before = probe_rewards(module, module.max_length)
    whole = layer.forward
    layer.forward = partial(_forward, whole)
    module.short_last_layer = True
    try:
        difference = probe_difference(probe_rewards(module, module.max_length), before)
        obstacle = None if difference <= probe_tolerance(module) else f"rewards differ by {difference:.2g}"
    except Exception as error:  # noqa: BLE001 - a model's own code raises what it likes, and the whole layer works
        obstacle = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    module.train(training)
    if obstacle is None:
        module.last_layer_reason = "last layer only where rewards are read"
    else:
        module.short_last_layer, layer.forward = False, whole
        module.last_layer_reason = (
            f"last layer whole, since a probe of it at the rewards' tokens alone failed ({obstacle})"
        )


def last_layer(module: RewardModule) -> nn.Module | None:
    """Returns the backbone's last layer, or None if the model does not say which modules its layers are."""
    names = set(module.base._no_split_modules or ())  # noqa: SLF001 - transformers has no public name for layers
    return next((part for part in reversed(list(module.backbone.modules())) if type(part).__name__ in names), None)


def _forward(
    whole: Callable[..., Any],
    hidden: Tensor,
    *args: Any,
    packed_row: PackedRow | None = None,
    read_at: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Runs a layer, only for the tokens at `read_at` if that is given.

    Args:
        whole: The layer's own forward pass.
        hidden: [1, tokens, size].
        *args: What else the layer takes, by position.
        packed_row: The row of these tokens.
        read_at: Row indices of the tokens wanted, [responses].
        **kwargs: What else the layer takes, by name.

    Returns:
        What the layer returns: hidden states, [1, responses filled up to a multiple of 32, size], or [1, tokens, size].
    """
    if read_at is None or packed_row is None:
        return whole(hidden, *args, packed_row=packed_row, **kwargs)
    try:
        whole(hidden, *args, packed_row=replace(packed_row, layout=_Stop()), **kwargs)
    except _Reached as reached:
        key, value = reached.key, reached.value
    filled = F.pad(read_at[None], (0, -len(read_at) % _UNIT), mode="replicate")[0]
    asked = filled[:, None]
    seen = (packed_row.start <= asked) & (asked < packed_row.end)
    layout = _AtTokens(key, value, seen, packed_row.position_ids[0], filled)
    at = partial(_take, tokens=hidden.shape[1], index=filled)
    return whole(
        at(hidden),
        *(at(value) for value in args),
        packed_row=replace(packed_row, layout=layout),
        **{name: at(value) for name, value in kwargs.items()},
    )


def _take(value: Any, *, tokens: int, index: Tensor) -> Any:
    """Returns what a layer is given for each token, [1, tokens, ...], for the tokens at an index; all else as it is."""
    if isinstance(value, tuple):
        return tuple(_take(part, tokens=tokens, index=index) for part in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == tokens:
        return value.index_select(1, index)
    return value


class _Reached(Exception):  # noqa: N818 - no error
    """A layer has come to its attention."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key = key
        self.value = value


class _Stop:
    """A layout that stops the layer at its attention."""

    def to(self, device: torch.device) -> _Stop:
        return self

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        raise _Reached(key, value)


@dataclass(frozen=True, slots=True)
class _AtTokens:
    """Attention of some of the row's tokens to what they see of the row.

    Attributes:
        key: Of the whole row, [1, key heads, tokens, head size].
        value: As `key`.
        seen: Which of the row's tokens each sees, [tokens asked, tokens].
        positions: Of the row's tokens in their sequences, [tokens].
        index: Row indices of the tokens asked, [tokens asked].
    """

    key: Tensor
    value: Tensor
    seen: Tensor
    positions: Tensor
    index: Tensor

    def to(self, device: torch.device) -> _AtTokens:
        key, value, seen = self.key.to(device), self.value.to(device), self.seen.to(device)
        return _AtTokens(key, value, seen, self.positions.to(device), self.index.to(device))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float, window: int | None
    ) -> Tensor:
        seen = self.seen
        if window is not None:
            seen = seen & ((self.positions[self.index][:, None] - self.positions).abs() < window)
        result = F.scaled_dot_product_attention(
            query,
            self.key,
            self.value,
            attn_mask=seen,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=query.shape[1] != self.key.shape[1],
        )
        return result.transpose(1, 2)
