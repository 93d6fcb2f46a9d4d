"""The backbone's last layer, computed only at the tokens that rewards are read at.

The last layer needs keys and values of every token, but queries, output projection and MLP only for the tokens whose
hidden state becomes a reward. So it runs twice: first over the whole row up to its attention, to capture keys and
values; then over the reward tokens alone, with those. It does not depend on the model's family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marginrm.attention.layout import AttentionOptions, KeysAndValues, additive
from marginrm.attention.matmul import masked_attention
from marginrm.forward.batch import PackedBatch
from marginrm.forward.execution import Choice
from marginrm.forward.module import RewardModule
from marginrm.forward.self_check import difference, probe_rewards, tolerance

# Reward tokens are filled to a multiple of this: oneDNN keeps a kernel for every number of rows.
_UNIT = 32


def try_it(module: RewardModule) -> Choice:
    """Cuts the last layer to the reward tokens, if the rewards of a probe stay the same.

    Heads that pool all tokens need the whole layer.

    Args:
        module: Changed in place.
    """
    if module.forward_path != "packed" or module.pooling is None or module.pooling.reads == "all":
        return Choice(False, "")
    layer = last_layer(module)
    if layer is None:
        return Choice(False, "last layer whole, since the model does not say which modules its layers are")
    before = probe_rewards(module)
    apply(module, layer)
    try:
        worst = difference(probe_rewards(module), before)
        obstacle = None if worst <= tolerance(module) else f"rewards differ by {worst:.2g}"
    except Exception as error:  # noqa: BLE001 - a model's own code raises errors of any class, and the whole layer works
        obstacle = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if obstacle is None:
        return Choice(True, "last layer only where rewards are read")
    undo(module)
    return Choice(False, f"last layer whole, since a probe at the reward tokens alone failed ({obstacle})")


def apply(module: RewardModule, layer: nn.Module) -> None:
    """Replaces the forward pass of a module's last layer."""
    layer.forward = TruncatedLastLayer(layer.forward, "last" if module.architecture == "decoder" else "first")
    module.execution = replace(module.execution, last_layer="reward_tokens")


def undo(module: RewardModule) -> None:
    """Gives the last layer its own forward pass back, if it was replaced."""
    layer = last_layer(module)
    if layer is not None and isinstance(layer.forward, TruncatedLastLayer):
        layer.forward = layer.forward.whole
    module.execution = replace(module.execution, last_layer="whole")


def layers_of(module: RewardModule) -> list[nn.Module]:
    """Returns the backbone's layers in order; none if the model does not say which modules its layers are."""
    names = set(module.base._no_split_modules or ())  # noqa: SLF001 - transformers has no public name for layers
    return [part for part in module.backbone.modules() if type(part).__name__ in names]


def last_layer(module: RewardModule) -> nn.Module | None:
    """Returns the backbone's last layer, or None if the model does not say which modules its layers are."""
    return next(reversed(layers_of(module)), None)


class TruncatedLastLayer:
    """The forward pass of a layer at the reward tokens of a packed batch; the whole layer without one.

    The first of its two runs ends inside the layer's attention, by an exception that this class raises and catches.

    Args:
        whole: The layer's own forward pass.
        reads: Which token of each response its reward is read at.
    """

    def __init__(self, whole: Callable[..., Any], reads: Literal["first", "last"]) -> None:
        self.whole = whole
        self._reads = reads

    def __call__(self, hidden: Tensor, *args: Any, packed_batch: PackedBatch | None = None, **kwargs: Any) -> Any:
        """Runs the layer.

        Args:
            hidden: [1, tokens, size].
            *args: The layer's other positional arguments.
            packed_batch: The batch of these tokens, or None.
            **kwargs: The layer's other keyword arguments.

        Returns:
            The layer's result: hidden states of the responses' reward tokens in order, [1, responses filled to a
            multiple of 32, size], or [1, tokens, size] without a packed batch.
        """
        if packed_batch is None:
            return self.whole(hidden, *args, packed_batch=packed_batch, **kwargs)
        key, value, cached = self._keys_and_values(hidden, args, kwargs, packed_batch)
        read_at = packed_batch.last if self._reads == "last" else packed_batch.first
        index = F.pad(read_at[None], (0, -len(read_at) % _UNIT), mode="replicate")[0]
        layout = _reward_token_layout(packed_batch, index, key, value, cached)

        def at(value: Any) -> Any:
            return _taken(value, tokens=hidden.shape[1], index=index)

        return self.whole(
            at(hidden),
            *map(at, args),
            packed_batch=replace(packed_batch, layout=layout, prefixes=None),
            **{name: at(value) for name, value in kwargs.items()},
        )

    def _keys_and_values(
        self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], batch: PackedBatch
    ) -> tuple[Tensor, Tensor, Sequence[KeysAndValues]]:
        try:
            self.whole(hidden, *args, packed_batch=replace(batch, layout=_CapturingLayout()), **kwargs)
        except _AttentionReached as reached:
            return reached.key, reached.value, reached.cached
        raise RuntimeError("the last layer did not call its attention function")


def _reward_token_layout(
    batch: PackedBatch, index: Tensor, key: Tensor, value: Tensor, cached: Sequence[KeysAndValues]
) -> _RewardTokenLayout:
    """Returns the layout of the reward tokens, which are at an index of the row."""
    seen = (batch.start <= index[:, None]) & (index[:, None] < batch.end)
    positions = batch.position_ids[0]
    own = positions[index]
    if cached:
        assert batch.cached_before is not None  # the plan has cached prefixes
        lengths = [known.key.shape[1] for known in cached]
        prefix = torch.arange(len(cached), device=key.device).repeat_interleave(
            torch.tensor(lengths, device=key.device)
        )
        seen = torch.cat([batch.cached_before[index][:, None] == prefix, seen], 1)
        positions = torch.cat([*(torch.arange(length, device=key.device) for length in lengths), positions])
        key = torch.cat([*(known.key for known in cached), key[0]], 1)[None]
        value = torch.cat([*(known.value for known in cached), value[0]], 1)[None]
    return _RewardTokenLayout(key, value, seen, positions, own)


def _taken(value: Any, *, tokens: int, index: Tensor) -> Any:
    """Returns an argument that has one entry per token, [1, tokens, ...], at an index; any other argument unchanged."""
    if isinstance(value, tuple):
        return tuple(_taken(part, tokens=tokens, index=index) for part in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == tokens:
        return value.index_select(1, index)
    return value


class _AttentionReached(Exception):  # noqa: N818 - not an error
    """A layer has called its attention function."""

    def __init__(self, key: Tensor, value: Tensor, cached: Sequence[KeysAndValues]) -> None:
        super().__init__()
        self.key = key
        self.value = value
        self.cached = cached


class _CapturingLayout:
    """A layout that ends the layer's run at its attention."""

    def to(self, device: torch.device) -> _CapturingLayout:
        return self

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        cached: Sequence[KeysAndValues] = (),
    ) -> Tensor:
        raise _AttentionReached(key, value, cached)


@dataclass(frozen=True, slots=True)
class _RewardTokenLayout:
    """Attention of the reward tokens to the cached prefixes and the whole row.

    Attributes:
        key: Keys of all these tokens, [1, key heads, tokens, head size].
        value: Values of all these tokens, [1, key heads, tokens, value size].
        seen: Which of them each reward token attends to, [reward tokens, tokens].
        positions: Their positions in their sequences, [tokens].
        own: Positions of the reward tokens, [reward tokens].
    """

    key: Tensor
    value: Tensor
    seen: Tensor
    positions: Tensor
    own: Tensor

    def to(self, device: torch.device) -> _RewardTokenLayout:
        key, value, seen = self.key.to(device), self.value.to(device), self.seen.to(device)
        return _RewardTokenLayout(key, value, seen, self.positions.to(device), self.own.to(device))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        cached: Sequence[KeysAndValues] = (),
    ) -> Tensor:
        seen = self.seen
        if options.window is not None:
            seen = seen & ((self.own[:, None] - self.positions).abs() < options.window)
        if options.plain:
            result = F.scaled_dot_product_attention(
                query,
                self.key,
                self.value,
                attn_mask=seen,
                dropout_p=options.dropout,
                scale=options.scale,
                enable_gqa=query.shape[1] != self.key.shape[1],
            )
        else:
            mask = additive(seen[None, None], query.dtype)
            result = masked_attention(query, self.key, self.value, mask, options)
        return result.transpose(1, 2)
