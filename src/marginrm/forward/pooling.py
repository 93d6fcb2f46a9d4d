"""Pooling: where a classifier reads its reward, and the head that turns hidden states into rewards, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from marginrm.encoding import Architecture


class ResponseBounds(NamedTuple):
    """Where responses lie among hidden states.

    Attributes:
        first: Index of each response's first token, [responses].
        last: Index of each response's last token, [responses]. For responses with steps, both have an entry per step.
        owner: The response that each token belongs to, [tokens]; None unless all tokens are pooled.
    """

    first: Tensor
    last: Tensor
    owner: Tensor | None


@dataclass(frozen=True, slots=True)
class Pooling:
    """One way to read rewards from hidden states, as a classifier of transformers does it.

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


def poolings_of(classifier: PreTrainedModel, architecture: Architecture | None = None) -> list[Pooling]:
    """Returns the ways in which a classifier may read its reward, by its modules; a probe tells which one is right.

    Args:
        classifier: A transformers classifier.
        architecture: If it is known already; by default a classifier with a `score` is taken for a decoder.
    """
    if architecture != "encoder" and _has(classifier, "score"):
        return [Pooling("last", ("score",), _last_token)]
    if architecture == "decoder" or not _has(classifier, "classifier"):
        return []
    if _has(classifier, "head") and _has(classifier, "drop"):  # ModernBERT
        if getattr(classifier.config, "classifier_pooling", "cls") == "cls":
            return [Pooling("first", ("head", "classifier"), _head_on_first)]
        return [Pooling("all", ("head", "classifier"), _head_on_mean)]
    found = [Pooling("first", ("classifier",), _classifier_on_first)]
    pooler = f"{classifier.base_model_prefix}.pooler"
    if _has(getattr(classifier, classifier.base_model_prefix, None), "pooler"):  # BERT and kin
        found.insert(0, Pooling("first", (pooler, "classifier"), partial(_classifier_on_pooled, pooler)))
    return found


def head_in_float32(classifier: PreTrainedModel, pooling: Pooling) -> Callable[[], None]:
    """Casts a head to float32, and its inputs at every call: in bfloat16 many rewards tie.

    Args:
        classifier: Changed in place.
        pooling: Names the modules.

    Returns:
        A function that undoes it.
    """
    parts = [classifier.get_submodule(path) for path in pooling.head]
    dtypes = [next((weight.dtype for weight in part.parameters()), None) for part in parts]
    hooks = [part.float().register_forward_pre_hook(_in_float32) for part in parts]

    def undo() -> None:
        for part, dtype, hook in zip(parts, dtypes, hooks, strict=True):
            hook.remove()
            part.to(dtype)

    return undo


def last_linear(classifier: PreTrainedModel, pooling: Pooling) -> nn.Linear | None:
    """Returns the linear layer that ends a head and gives one value; None if the head ends otherwise."""
    layers = list(classifier.get_submodule(pooling.head[-1]).modules())
    found = layers[-1]
    return found if isinstance(found, nn.Linear) and found.out_features == 1 else None


@contextmanager
def inputs_of(layer: nn.Linear) -> Iterator[list[Tensor]]:
    """Collects the inputs of a layer while it is called, in float32."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].float())

    hook = layer.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def _has(part: nn.Module | None, name: str) -> bool:
    return isinstance(getattr(part, name, None), nn.Module)


def _in_float32(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(argument.float() for argument in args)


def _last_token(model: Any, hidden: Tensor, bounds: ResponseBounds) -> Tensor:
    return _one_value(model.score(hidden[bounds.last]), bounds)


def _classifier_on_pooled(pooler: str, model: Any, hidden: Tensor, bounds: ResponseBounds) -> Tensor:
    pooled = model.get_submodule(pooler)(hidden[bounds.first][:, None])
    dropout = getattr(model, "dropout", None)
    return _one_value(model.classifier(dropout(pooled) if dropout else pooled), bounds)


def _classifier_on_first(model: Any, hidden: Tensor, bounds: ResponseBounds) -> Tensor:
    # Heads of several layers index the first of [responses, tokens, size]; a linear one treats each token by itself.
    return _one_value(model.classifier(hidden[bounds.first][:, None]), bounds)


def _head_on_first(model: Any, hidden: Tensor, bounds: ResponseBounds) -> Tensor:
    return _one_value(model.classifier(model.drop(model.head(hidden[bounds.first]))), bounds)


def _head_on_mean(model: Any, hidden: Tensor, bounds: ResponseBounds) -> Tensor:
    assert bounds.owner is not None  # encoders share no tokens
    responses = len(bounds.first)
    sums = torch.zeros(responses + 1, hidden.shape[1], device=hidden.device)  # the last row takes a filler's tokens
    sums = sums.index_add(0, bounds.owner, hidden.float())[:responses]
    means = sums / (bounds.last - bounds.first + 1)[:, None]
    return _one_value(model.classifier(model.drop(model.head(means))), bounds)


def _one_value(values: Tensor, bounds: ResponseBounds) -> Tensor:
    return values.reshape(len(bounds.first))
