"""The forward pass that training and serving share: a batch of tokens in, one float32 reward per response out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from marginrm.attention.amx import tile_layout
from marginrm.attention.blocked import block_layout
from marginrm.attention.flex import interval_layout
from marginrm.attention.gathered import SPLIT_FROM, gathered_layout
from marginrm.attention.layout import LayoutFn
from marginrm.encoding import Architecture, EncodedGroup
from marginrm.errors import ModelError
from marginrm.forward.batch import Batch, PackedBatch, PaddedBatch, SplitBatch, pack, pad, split
from marginrm.forward.execution import Execution
from marginrm.forward.own_forward import own_rewards, pad_token_of
from marginrm.forward.pooling import Pooling, ResponseBounds, inputs_of, last_linear
from marginrm.forward.rope import every_length_differs
from marginrm.prefix_cache import StepPrefixes
from marginrm.steps import ForwardPath, GroupSlice, split_by_length


class Readout(nn.Module, ABC):
    """Further columns beside the rewards, from the inputs of the head's last linear layer."""

    def forward(self, features: Tensor) -> Tensor:
        """Returns the columns of each response: [responses, size] to [responses, columns], both float32."""
        return features

    @abstractmethod
    def rewards(self, rows: Tensor) -> list[float]:
        """Returns one reward per response, which may carry more, from [responses, 1 + columns]."""


class RewardModule(nn.Module):
    """A sequence classifier with one label, run on packed rows wherever that is exact.

    It only holds and computes: `eligibility.build_module` decides the path, `tuning.tune` the execution.

    Args:
        classifier: A transformers sequence-classification model (or a PEFT wrapper of one) with one label.
        max_length: The longest sequence that it will be given, in tokens.
        pooling: Where the reward is read; None if the classifier's own forward computes it.
        forward_path: `packed`, `padded`, or `one_at_a_time` for classifiers whose rewards depend on the batch.
        path_reason: Why that path, in words.
        architecture: `decoder` or `encoder`; by default as the pooling says.
        length_boundary: A forward pass takes only sequences up to this length, or only longer ones (`rope.length_boundary`).

    Attributes:
        classifier: As given; save it with `classifier.save_pretrained`.
        max_length: As given.
        pooling: As given.
        forward_path: As given.
        length_boundary: As given.
        execution: How packed rows are computed here.
        probe_difference: The largest difference to the classifier's own forward in the probe at load, relative to the
            larger of 1 and the reward; None if there was no probe.
    """

    def __init__(
        self,
        classifier: PreTrainedModel,
        *,
        max_length: int,
        pooling: Pooling | None,
        forward_path: ForwardPath,
        path_reason: str,
        architecture: Architecture | None = None,
        length_boundary: int | None = None,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.train(classifier.training)
        self.max_length = max_length
        self.pooling = pooling
        self.forward_path: ForwardPath = forward_path
        self.length_boundary = length_boundary
        self.architecture: Architecture = architecture or (pooling.architecture if pooling else "encoder")
        self.probe_difference: float | None = None
        self.execution = Execution(device=self.device.type)
        self._path_reason = path_reason
        self._first_position = _first_position(self.backbone)
        # FSDP shards by these layers, and accelerate looks for them here.
        self._no_split_modules = self.base._no_split_modules  # noqa: SLF001 - transformers has no public name for it

    @property
    def base(self) -> PreTrainedModel:
        """The classifier itself, without a PEFT wrapper around it."""
        unwrap = getattr(self.classifier, "get_base_model", None)
        return cast("PreTrainedModel", unwrap()) if unwrap else self.classifier

    @property
    def backbone(self) -> nn.Module:
        """The classifier without its head."""
        return cast("nn.Module", getattr(self.base, self.base.base_model_prefix, self.base))

    @property
    def last_linear(self) -> nn.Linear | None:
        """The linear layer that gives the reward; None if the head ends otherwise, or the model's own forward reads it."""
        return last_linear(self.base, self.pooling) if self.pooling else None

    @property
    def forward_reason(self) -> str:
        """Why that path, and how packed rows are computed here, in words."""
        return "; ".join((self._path_reason, *self.execution.reasons))

    @property
    def config(self) -> object:
        """The classifier's configuration, under the name that trainers use."""
        return self.base.config

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's dtype; the head is always float32."""
        return next(self.backbone.parameters()).dtype

    def collate(
        self, groups: Sequence[EncodedGroup], *, multiple: int = 1, prefixes: StepPrefixes | None = None
    ) -> Batch:
        """Makes the batch of some groups for this module's path, on the CPU.

        Args:
            groups: Encoded responses, those with a common prompt together.
            multiple: Packed rows are filled to a multiple of so many tokens (in deterministic mode to whole tiles).
            prefixes: What a prefix cache has of these groups (`execution.prefix_bytes` says if the module takes any).
        """
        collate = partial(self._collate, multiple=multiple, prefixes=prefixes)
        if self.length_boundary is None and self.forward_path != "one_at_a_time":
            return collate(groups)
        whole = [GroupSlice(number, 0, len(group)) for number, group in enumerate(groups)]
        lengths = [[response.tokens for response in group] for group in groups]
        alone, differ = self.forward_path == "one_at_a_time", every_length_differs(self.base.config)
        steps = list(split_by_length(whole, lengths, self.length_boundary, every_length=differ, alone=alone))
        return collate(groups) if len(steps) == 1 else split(steps, groups, collate)

    def _collate(
        self, groups: Sequence[EncodedGroup], *, multiple: int, prefixes: StepPrefixes | None
    ) -> PackedBatch | PaddedBatch:
        if self.forward_path == "packed":
            multiple = self.execution.tile or multiple
            causal = self.architecture == "decoder"
            return pack(groups, causal=causal, layout=self._layout(), multiple=multiple, prefixes=prefixes)
        return pad(groups, pad_token_id=pad_token_of(self.base))

    def forward(self, batch: Batch, readout: Readout | None = None) -> Tensor:
        """Computes rewards.

        Args:
            batch: Made by `collate`, on the module's device.
            readout: Makes further columns beside the rewards; only for a module with a `last_linear`.

        Returns:
            Float32 rewards, [responses], in the order of the groups and of the responses in them; differentiable. For
            responses with steps, the value at each step, [values]. With a `readout`, its columns follow the rewards,
            [responses, 1 + columns].
        """
        if isinstance(batch, SplitBatch):
            return torch.cat([self(part, readout) for part in batch.parts]).index_select(0, batch.order)
        if isinstance(batch, PackedBatch):
            return self._forward_packed(batch, readout)
        return self._forward_padded(batch, readout)

    def _layout(self) -> LayoutFn:
        """Returns the function that prepares attention over packed rows."""
        chosen = self.execution
        if chosen.device != self.device.type:
            return gathered_layout
        if chosen.attention == "blocked":
            return block_layout
        if chosen.attention == "flex":
            return interval_layout
        split_from = SPLIT_FROM if chosen.splits_prefix else None
        if chosen.attention == "amx":
            return partial(tile_layout, split_from=split_from)
        return partial(gathered_layout, split_from=split_from, matmul=chosen.attention == "matmul")

    def _forward_packed(self, batch: PackedBatch, readout: Readout | None) -> Tensor:
        inputs: dict[str, Any] = {} if batch.type_ids is None else {"token_type_ids": batch.type_ids}
        if self.architecture == "decoder":
            inputs["use_cache"] = False
        hidden = self.backbone(
            input_ids=batch.ids,
            position_ids=batch.position_ids + self._first_position,
            # transformers passes a 4D mask on as it is, so it does not build a [tokens, tokens] mask.
            attention_mask=torch.empty(1, 1, 1, 1, device=batch.ids.device),
            packed_batch=batch,
            **inputs,
        ).last_hidden_state[0]
        if self.execution.last_layer == "whole":
            return self._rewards(hidden, ResponseBounds(batch.first, batch.last, batch.owner), readout)
        places = torch.arange(batch.rewards, device=hidden.device)
        return self._rewards(hidden, ResponseBounds(places, places, None), readout)

    def _forward_padded(self, batch: PaddedBatch, readout: Readout | None) -> Tensor:
        if self.pooling is None:
            if batch.read_at is not None:
                raise ModelError("The model's own forward gives one value per sequence, and none per step.")
            return own_rewards(self.classifier, batch)
        inputs: dict[str, Any] = {} if batch.type_ids is None else {"token_type_ids": batch.type_ids}
        if self.architecture == "decoder":
            inputs["use_cache"] = False
        hidden = self.backbone(input_ids=batch.ids, attention_mask=batch.mask, **inputs).last_hidden_state
        responses, longest = batch.ids.shape
        if batch.read_at is not None:
            return self._rewards(hidden.flatten(0, 1), ResponseBounds(batch.read_at, batch.read_at, None), readout)
        first = torch.arange(responses, device=hidden.device) * longest
        owner = torch.where(batch.mask.bool(), torch.arange(responses, device=hidden.device)[:, None], responses)
        return self._rewards(
            hidden.flatten(0, 1), ResponseBounds(first, first + batch.lengths - 1, owner.flatten()), readout
        )

    def _rewards(self, hidden: Tensor, bounds: ResponseBounds, readout: Readout | None) -> Tensor:
        assert self.pooling is not None  # models without one take their own forward
        with torch.autocast(hidden.device.type, enabled=False):
            if readout is None:
                return self.pooling.rewards(self.base, hidden, bounds)
            layer = self.last_linear
            assert layer is not None  # a readout is set for such heads only
            with inputs_of(layer) as seen:
                rewards = self.pooling.rewards(self.base, hidden, bounds)
            features = seen[0].reshape(len(rewards), layer.in_features)
            return torch.cat([rewards[:, None], readout(features)], dim=1)


def _first_position(backbone: nn.Module) -> int:
    """Returns the position of a sequence's first token: RoBERTa and kin count from behind the padding token's."""
    for name, part in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            return part.padding_idx + 1
    return 0


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode for a while; each of its parts then goes back to its own mode."""
    if not module.training:
        yield
        return
    parts = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in parts:
            part.training = True
