"""The forward pass that training and serving share: a batch of tokens in, one float32 reward per response out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from marginrm.attention.blocked import block_layout
from marginrm.attention.flex import interval_layout
from marginrm.attention.gathered import SPLIT_FROM, gathered_layout
from marginrm.attention.layout import LayoutFn
from marginrm.encoding import Architecture
from marginrm.forward.batch import EncodedGroup, PackedBatch, PaddedBatch, pack, pad
from marginrm.forward.execution import Execution
from marginrm.forward.pooling import Pooling, ResponseBounds
from marginrm.steps import ForwardPath


class RewardModule(nn.Module):
    """A sequence classifier with one label, run on packed rows wherever that is exact.

    It only holds and computes: `eligibility.build_module` decides the path, `tuning.tune` the execution.

    Args:
        classifier: A transformers sequence-classification model (or a PEFT wrapper of one) with one label.
        max_length: The longest sequence that it will be given, in tokens.
        pooling: The family's head; None if only the classifier's own forward computes rewards.
        forward_path: `packed`, or `padded` for models that packing cannot represent exactly.
        path_reason: Why that path, in words.

    Attributes:
        classifier: As given; save it with `classifier.save_pretrained`.
        max_length: As given.
        pooling: As given.
        forward_path: As given.
        execution: How packed rows are computed here.
    """

    def __init__(
        self,
        classifier: PreTrainedModel,
        *,
        max_length: int,
        pooling: Pooling | None,
        forward_path: ForwardPath,
        path_reason: str,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.train(classifier.training)
        self.max_length = max_length
        self.pooling = pooling
        self.forward_path: ForwardPath = forward_path
        self.execution = Execution(device=self.device.type)
        self._path_reason = path_reason
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
        return cast("nn.Module", getattr(self.base, self.base.base_model_prefix))

    @property
    def architecture(self) -> Architecture:
        """`decoder` (reward at the last token) or `encoder` (reward at the first, or over all)."""
        return self.pooling.architecture if self.pooling else "encoder"

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

    def collate(self, groups: Sequence[EncodedGroup], *, multiple: int = 1) -> PackedBatch | PaddedBatch:
        """Makes the batch of some groups for this module's path, on the CPU.

        Args:
            groups: Encoded responses, those with a common prompt together.
            multiple: Packed rows are filled to a multiple of so many tokens (in deterministic mode to whole tiles).
        """
        if self.forward_path == "packed":
            multiple = self.execution.tile or multiple
            return pack(groups, causal=self.architecture == "decoder", layout=self._layout(), multiple=multiple)
        return pad(groups, pad_token_id=self.base.config.pad_token_id)

    def forward(self, batch: PackedBatch | PaddedBatch) -> Tensor:
        """Computes rewards.

        Args:
            batch: Made by `collate`, on the module's device.

        Returns:
            Float32 rewards, [responses], in the order of the groups and of the responses in them; differentiable.
        """
        if isinstance(batch, PackedBatch):
            return self._forward_packed(batch)
        return self._forward_padded(batch)

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
        return partial(gathered_layout, split_from=split_from, matmul=chosen.attention == "matmul")

    def _forward_packed(self, batch: PackedBatch) -> Tensor:
        inputs: dict[str, Any] = {} if batch.type_ids is None else {"token_type_ids": batch.type_ids}
        if self.architecture == "decoder":
            inputs["use_cache"] = False
        hidden = self.backbone(
            input_ids=batch.ids,
            position_ids=batch.position_ids,
            # transformers passes a 4D mask on as it is, so it does not build a [tokens, tokens] mask.
            attention_mask=torch.empty(1, 1, 1, 1, device=batch.ids.device),
            packed_batch=batch,
            **inputs,
        ).last_hidden_state[0]
        if self.execution.last_layer == "whole":
            return self._rewards(hidden, ResponseBounds(batch.first, batch.last, batch.owner))
        places = torch.arange(batch.rewards, device=hidden.device)
        return self._rewards(hidden, ResponseBounds(places, places, None))

    def _forward_padded(self, batch: PaddedBatch) -> Tensor:
        inputs: dict[str, Any] = {} if batch.type_ids is None else {"token_type_ids": batch.type_ids}
        if self.pooling is None:
            logits = self.base(input_ids=batch.ids, attention_mask=batch.mask, **inputs).logits
            return cast("Tensor", logits.float()[:, 0])
        if self.architecture == "decoder":
            inputs["use_cache"] = False
        hidden = self.backbone(input_ids=batch.ids, attention_mask=batch.mask, **inputs).last_hidden_state
        responses, longest = batch.ids.shape
        first = torch.arange(responses, device=hidden.device) * longest
        owner = torch.where(batch.mask.bool(), torch.arange(responses, device=hidden.device)[:, None], responses)
        return self._rewards(hidden.flatten(0, 1), ResponseBounds(first, first + batch.lengths - 1, owner.flatten()))

    def _rewards(self, hidden: Tensor, bounds: ResponseBounds) -> Tensor:
        assert self.pooling is not None  # models without one take their own forward
        with torch.autocast(hidden.device.type, enabled=False):
            return self.pooling.rewards(self.base, hidden, bounds)


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
