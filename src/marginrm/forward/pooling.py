"""Pooling: where each family reads its reward, and the head that turns hidden states into rewards, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from marginrm.encoding import Architecture


class ResponseBounds(NamedTuple):
    """Where responses lie among hidden states.

    Attributes:
        first: Index of each response's first token, [responses].
        last: Index of each response's last token, [responses].
        owner: The response that each token belongs to, [tokens]; None unless all tokens are pooled.
    """

    first: Tensor
    last: Tensor
    owner: Tensor | None


@dataclass(frozen=True, slots=True)
class Pooling:
    """One family's head.

    Attributes:
        reads: The tokens of a response whose hidden states become its reward.
        head: Paths of the modules after the backbone, which compute in float32.
        rewards: From the classifier, hidden states [tokens, size] and bounds to rewards, [responses].
    """

    reads: Literal["last", "first", "all"]
    head: tuple[str, ...]
    rewards: Callable[[Any, Tensor, ResponseBounds], Tensor]

    @property
    def architecture(self) -> Architecture:
        """`decoder` for rewards at the last token, else `encoder`."""
        return "decoder" if self.reads == "last" else "encoder"


def pooling_of(classifier: PreTrainedModel) -> Pooling | None:
    """Returns a family's pooling; None if only the classifier's own forward computes it."""
    if isinstance(getattr(classifier, "score", None), nn.Module):
        return Pooling("last", ("score",), _last_token)
    if classifier.config.model_type == "bert":
        return Pooling("first", ("bert.pooler", "classifier"), _bert)
    if classifier.config.model_type == "modernbert":
        if classifier.config.classifier_pooling == "cls":
            return Pooling("first", ("head", "classifier"), _modernbert_first)
        return Pooling("all", ("head", "classifier"), _modernbert_mean)
    return None


def keep_head_in_float32(classifier: PreTrainedModel, pooling: Pooling | None) -> None:
    """Casts a head to float32, and its inputs at every call: in bfloat16 many rewards tie.

    Args:
        classifier: Changed in place.
        pooling: As `pooling_of` found it; without one the modules that usually are a head are cast.
    """
    found = dict(classifier.named_modules())
    for name in pooling.head if pooling else ("score",):
        if name in found:
            found[name].float().register_forward_pre_hook(_in_float32)


def _in_float32(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(argument.float() for argument in args)


def _last_token(model: Any, hidden: Tensor, bounds: ResponseBounds) -> Tensor:
    return cast("Tensor", model.score(hidden[bounds.last])[:, 0])


def _bert(model: Any, hidden: Tensor, bounds: ResponseBounds) -> Tensor:
    pooled = model.bert.pooler(hidden[bounds.first][:, None])
    return cast("Tensor", model.classifier(model.dropout(pooled))[:, 0])


def _modernbert_first(model: Any, hidden: Tensor, bounds: ResponseBounds) -> Tensor:
    return _modernbert_head(model, hidden[bounds.first])


def _modernbert_mean(model: Any, hidden: Tensor, bounds: ResponseBounds) -> Tensor:
    assert bounds.owner is not None  # encoders share no tokens
    responses = len(bounds.first)
    sums = torch.zeros(responses + 1, hidden.shape[1], device=hidden.device)  # the last row takes a filler's tokens
    sums = sums.index_add(0, bounds.owner, hidden.float())[:responses]
    return _modernbert_head(model, sums / (bounds.last - bounds.first + 1)[:, None])


def _modernbert_head(model: Any, pooled: Tensor) -> Tensor:
    return cast("Tensor", model.classifier(model.drop(model.head(pooled)))[:, 0])
