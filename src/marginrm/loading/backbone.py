"""The part of a checkpoint below its head: its class, its weights' names, whether it is causal, a head put on it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from marginrm.loading.files import CheckpointFiles, StoredTensor

_MARKED_LABELS = 7919  # a number of labels that no other size of a model has
_PROBE_TOKENS = 16
# Share of a change that rounding may carry to earlier tokens: the products of a mixture of experts are grouped by token,
# and round accordingly. Attention carries far more.
_ROUNDING = 1e-4
_ROUNDING_OF_HALF = 0.02


@dataclass(frozen=True, slots=True)
class WeightMap:
    """A checkpoint's weights, told apart by what transformers' classes have.

    Attributes:
        prefix: What stands before the backbone's names in the checkpoint.
        left_over: The weights that are not the backbone's.
        classifier_head: Names of the weights that transformers' own classifier has beside its backbone; None where
            transformers has no classifier for this backbone.
        label_weights: Those of them that have a row for each label.
    """

    prefix: str
    left_over: Mapping[str, StoredTensor]
    classifier_head: frozenset[str] | None
    label_weights: tuple[str, ...]


def map_weights(files: CheckpointFiles, config: PreTrainedConfig) -> WeightMap:
    """Tells the backbone's weights from the others by their names, without reading any.

    Args:
        files: The checkpoint.
        config: Its configuration, of a type that transformers knows.
    """
    marked = copy.deepcopy(config)
    marked.num_labels = _MARKED_LABELS
    with torch.device("meta"):
        classifier = _classifier_or_none(marked)
        backbone = classifier.base_model if classifier is not None else AutoModel.from_config(marked)
    expected = set(backbone.state_dict())
    prefix = _prefix(files.tensors, expected)
    parts = {name.partition(".")[0] for name in expected}
    own = f"{backbone.base_model_prefix}."  # some classes rename the weights below it while they load
    left_over = {
        name: stored
        for name, stored in files.tensors.items()
        if not (name.startswith(prefix) and name.removeprefix(prefix).partition(".")[0] in parts)
        and not name.startswith(own)
    }
    if classifier is None:
        return WeightMap(prefix, left_over, None, ())
    head = {name: value for name, value in classifier.state_dict().items() if not name.startswith(own)}
    labelled = tuple(name for name, value in head.items() if value.shape[:1] == (_MARKED_LABELS,))
    return WeightMap(prefix, left_over, frozenset(head), labelled)


def is_causal(backbone: nn.Module, config: PreTrainedConfig) -> bool:
    """Returns whether no token's hidden state depends on later tokens, seen by changing the second half of a sequence.

    Args:
        backbone: Takes `input_ids` and `attention_mask` and gives `last_hidden_state`.
        config: The model's configuration. A type with a masked language model and none that generates is not causal.
    """
    kind = type(config)
    if config.is_encoder_decoder or (kind in MODEL_FOR_MASKED_LM_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING):
        return False
    vocabulary = len(cast("nn.Embedding", cast("PreTrainedModel", backbone).get_input_embeddings()).weight)
    parameter = next(backbone.parameters())
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=parameter.device)[None] % vocabulary
    other = ids.clone()
    other[0, _PROBE_TOKENS // 2 :] = (ids[0, _PROBE_TOKENS // 2 :] + vocabulary // 2) % vocabulary
    with torch.inference_mode():
        first, second = (
            backbone(input_ids=one, attention_mask=torch.ones_like(one)).last_hidden_state[0].float()
            for one in (ids, other)
        )
    change = (first - second).abs().amax(-1)
    rounding = _ROUNDING if parameter.dtype == torch.float32 else _ROUNDING_OF_HALF
    return bool(change[: _PROBE_TOKENS // 2].max() <= rounding * change.max())


def classifier_around(backbone: PreTrainedModel, score: nn.Module) -> PreTrainedModel:
    """Puts a head on a backbone: a classifier of transformers' usual form, of one label.

    Args:
        backbone: A causal model.
        score: Takes hidden states [..., hidden] and gives [..., 1].

    Returns:
        A model with the attributes of transformers' own classifiers: the backbone under `base_model_prefix`, the head
        as `score`, and a forward pass that gives `logits` of the last token that is not padding.
    """
    config = copy.deepcopy(backbone.config)
    config.num_labels = 1
    family: Any = next(one for one in type(backbone).__mro__[1:] if one.__name__.endswith("PreTrainedModel"))
    prefix = family.base_model_prefix or "model"

    def make(self: Any, config: PreTrainedConfig) -> None:
        family.__init__(self, config)
        self.num_labels = config.num_labels
        setattr(self, prefix, type(backbone)(config))
        self.score = nn.Identity()
        self.post_init()

    name = f"{type(backbone).__name__.removesuffix('Model')}ForSequenceClassification"
    attributes = {"__init__": make, "base_model_prefix": prefix, "__module__": type(backbone).__module__}
    with torch.device("meta"):
        classifier = type(name, (GenericForSequenceClassification, family), attributes)(config)
    setattr(classifier, prefix, backbone)
    classifier.score = score
    return cast("PreTrainedModel", classifier.eval())


def classifier_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Returns transformers' own classifier for a configuration, or None."""
    found = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    return cast("type[PreTrainedModel] | None", found[0] if isinstance(found, tuple) else found)


def has_backbone(config: PreTrainedConfig) -> bool:
    """Returns whether transformers has a class for the model below the head."""
    return type(config) in MODEL_MAPPING


def _classifier_or_none(config: PreTrainedConfig) -> PreTrainedModel | None:
    if classifier_class(config) is None:
        return None
    return cast("PreTrainedModel", AutoModelForSequenceClassification.from_config(config))


def _prefix(names: Mapping[str, Any], expected: set[str]) -> str:
    """Returns what most of the backbone's names have before them in the checkpoint."""
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in expected:
                found[".".join(parts[:cut])] += 1
                break
    best = found.most_common(1)
    return f"{best[0][0]}." if best and best[0][0] else ""
