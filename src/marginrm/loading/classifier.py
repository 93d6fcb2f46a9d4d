"""A checkpoint as a classifier of one label: a backbone and a head, found by the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from marginrm.errors import ConfigError, HeadError
from marginrm.loading.adapters import embedding_rows, merge_adapter, resize, with_adapter
from marginrm.loading.backbone import WeightMap, classifier_around, is_causal, map_weights
from marginrm.loading.files import CheckpointFiles
from marginrm.loading.heads import FoundHead, build_head, find_head, float32_linear, is_harmless, normalisation, one_row
from marginrm.loading.own_code import OwnCode, load_own_code, seems_causal, weigh_values
from marginrm.loading.refusals import no_head, refuse_token_classes
from marginrm.loading.token_logits import TokenReward, load_token_logits
from marginrm.loading.weights import Target, check_missing, load_model
from marginrm.reading import ReadingOptions

Usage = Literal["classifier", "value-head", "token-logits", "own-code"]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint's parts on this machine.

    Attributes:
        files: The model's files; for an adapter its base's, with the adapter's weights added.
        config: The model's configuration.
        adapter: The adapter's files, or None.
    """

    files: CheckpointFiles
    config: PreTrainedConfig
    adapter: CheckpointFiles | None = None


@dataclass(frozen=True, slots=True)
class LoadedClassifier:
    """A classifier of one label and what is known of it.

    Attributes:
        classifier: In evaluation mode, on its device. A decoder's head is its `score`.
        usage: How its author's library reads it.
        causal: Whether it is a decoder.
        head: The head in words.
        skips_padding: Whether its library reads the last token that is not padding, and not the last one.
        notes: What a user should know of.
    """

    classifier: PreTrainedModel
    usage: Usage
    causal: bool
    head: str
    skips_padding: bool = False
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Plan:
    """The way a checkpoint will be loaded, decided before any weight is read.

    Attributes:
        own: Its own class, if that shall compute the rewards.
        tokens: The vocabulary entries whose logits are the rewards, if they are.
        weights: Its weights, told apart; None with `own` or `tokens`.
        head: A head that transformers' own classifier for this backbone does not have.
    """

    own: OwnCode | None = None
    tokens: TokenReward | None = None
    weights: WeightMap | None = None
    head: FoundHead | None = None


def plan_by_weights(source: Source, options: ReadingOptions | None = None) -> Plan:
    """Finds the head of a checkpoint among its weights.

    Args:
        source: The checkpoint.
        options: What the user says about it.

    Raises:
        HeadError: It has none that gives one reward, or weights that have no place.
    """
    files, config = source.files, source.config
    weights = map_weights(files, config)
    weighed = options is not None and options.label_weights is not None
    if _is_standard(files, weights, config):
        if not weighed:
            refuse_token_classes(files, _rows(files, weights))
        return Plan(weights=weights)
    text = config.get_text_config()
    found = find_head(
        weights.left_over,
        name=f"{files.name} ({files.class_name})" if files.class_name else files.name,
        hidden={int(getattr(text, name, None) or 0) for name in ("hidden_size", "word_embed_proj_dim")} - {0},
        vocabulary=_vocabulary(config),
        prefix=files.config.get("value_head_prefix"),
    )
    if found is None:
        if files.class_name.endswith("ForSequenceClassification"):
            check_missing(files, (weights.classifier_head or frozenset()) - files.tensors.keys())
        raise no_head(files)
    if not weighed:
        refuse_token_classes(files, found.rows)
    return Plan(weights=weights, head=found)


def has_head(source: Source) -> bool:
    """Returns whether there is a reward head among a checkpoint's weights."""
    try:
        plan_by_weights(source)
    except HeadError:
        return False
    return True


def load_classifier(
    source: Source, plan: Plan, target: Target, options: ReadingOptions, *, has_template: bool
) -> LoadedClassifier:
    """Loads a checkpoint of any kind.

    Args:
        source: The checkpoint.
        plan: What was found in it.
        target: Where and how.
        options: What the user says about it.
        has_template: Whether its tokenizer has a chat template.

    Raises:
        HeadError: It has no head that gives one reward, or weights that have no place.
        ModelError: It cannot be read.
    """
    if plan.own is not None:
        model = with_adapter(load_own_code(plan.own, source.files, source.config, target), source.adapter)
        if options.label_weights is not None:
            weigh_values(model, options.label_weights)
        causal = seems_causal(model, source.config, has_template=has_template)
        return LoadedClassifier(
            model, "own-code", causal, f"the forward pass of {plan.own.class_name} ({plan.own.file})"
        )
    if plan.tokens is not None:
        model = load_token_logits(plan.tokens, source.files, source.config, target, source.adapter)
        return LoadedClassifier(
            model, "token-logits", causal=True, head=f"output rows of the vocabulary: {plan.tokens.words}"
        )
    assert plan.weights is not None
    if plan.head is not None:
        return _assembled(source, plan.weights, plan.head, target, options)
    return _standard(source, plan.weights, target, options)


def _is_standard(files: CheckpointFiles, weights: WeightMap, config: PreTrainedConfig) -> bool:
    """Returns whether the weights beside the backbone are those of transformers' own classifier, and no others."""
    head = weights.classifier_head
    if not head or not head <= files.tensors.keys():
        return False
    vocabulary = _vocabulary(config)
    return all(name in head or is_harmless(name, one.shape, vocabulary) for name, one in weights.left_over.items())


def _rows(files: CheckpointFiles, weights: WeightMap) -> int:
    return files.tensors[weights.label_weights[0]].shape[0] if weights.label_weights else 1


def _standard(source: Source, weights: WeightMap, target: Target, options: ReadingOptions) -> LoadedClassifier:
    files, config = source.files, copy.deepcopy(source.config)
    config.num_labels = rows = _rows(files, weights)
    model, missing = load_model(AutoModelForSequenceClassification, files, config, target)
    check_missing(files, missing - files.added.keys())
    model = with_adapter(model, source.adapter)
    for name in {name.rpartition(".")[0] for name in weights.label_weights}:
        last = model.get_submodule(name)
        if rows > 1 or options.label_weights is not None:
            labels = files.config.get("id2label")
            _set_module(
                model, name, one_row(cast("nn.Linear", last), options.label_weights, name=files.name, labels=labels)
            )
    model.config.num_labels = 1
    cast("Any", model).num_labels = 1
    causal = is_causal(model.base_model, model.config)
    model = _with_score(model, weights) if causal else model
    if causal:
        _normalise(model, files)
    head = f"{', '.join(sorted({name.rpartition('.')[0] for name in weights.classifier_head or ()}))} ({rows} {'row' if rows == 1 else 'rows'})"
    skips = causal and _skips_padding(files)
    usage: Usage = "classifier" if skips or not causal else "value-head"
    return LoadedClassifier(model.eval(), usage, causal, head, skips_padding=skips)


def _assembled(
    source: Source, weights: WeightMap, found: FoundHead, target: Target, options: ReadingOptions
) -> LoadedClassifier:
    files, config = source.files, source.config
    score = build_head(found, files, options)
    known = [name for layer in found.layers for name in (layer.weight, layer.bias) if name]
    backbone, missing = load_model(AutoModel, files, config, target, prefix=weights.prefix, known=known)
    check_missing(files, missing - files.added.keys())
    if not is_causal(backbone, config):
        raise HeadError(
            f"{files.name} has a head named {found.name} on a {type(backbone).__name__}, which is not causal: transformers' "
            f"classifier for it has {', '.join(sorted(weights.classifier_head or ())) or 'no such head'}."
        )
    model = classifier_around(backbone, score.to(target.device))
    if source.adapter is not None:
        resize(model, embedding_rows(source.adapter))
        model = merge_adapter(model, source.adapter, without=known)
    is_classifier = files.class_name.endswith("ForSequenceClassification")
    notes = []
    if is_classifier and weights.classifier_head and weights.classifier_head <= files.tensors.keys():
        dropped = sorted(set(known) - weights.classifier_head)
        notes.append(f"transformers' {files.class_name} drops {', '.join(dropped)} without a word; here they are read.")
    return LoadedClassifier(
        model.eval(),
        "value-head",
        causal=True,
        head=found.describe(),
        skips_padding=is_classifier,
        notes=tuple(notes),
    )


def _with_score(model: PreTrainedModel, weights: WeightMap) -> PreTrainedModel:
    """Returns a causal classifier whose head is called `score`: the modules of its own head, one after another."""
    if isinstance(getattr(model, "score", None), nn.Module):
        return model
    names = {name.partition(".")[0] for name in weights.classifier_head or ()}
    parts = [module for name, module in model.named_children() if name in names]
    made = classifier_around(
        cast("PreTrainedModel", model.base_model), parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    )
    ids = torch.arange(1, 9, device=model.device)[None]
    with torch.inference_mode():
        agree = torch.allclose(
            made(input_ids=ids).logits.float(), model(input_ids=ids).logits.float(), rtol=1e-3, atol=1e-3
        )
    return made if agree else model


def _normalise(model: PreTrainedModel, files: CheckpointFiles) -> None:
    scale = normalisation(files)
    last = getattr(model, "score", None)
    if scale is None or not isinstance(last, nn.Linear):
        return
    mean, std = scale
    bias = torch.zeros(1, device=last.weight.device) if last.bias is None else last.bias.detach().float()
    scaled = float32_linear(last.weight.detach().float() / std, (bias - mean) / std)
    model.score = scaled


def _skips_padding(files: CheckpointFiles) -> bool:
    """Returns whether the author's library passes over padding tokens at the end, as transformers' classifiers do.

    OpenRLHF and token classifiers read the last token, whatever it is.
    """
    own_reading = "value_head_prefix" in files.config or files.class_name == "RewardModel"
    return not own_reading and not files.class_name.endswith("ForTokenClassification")


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _vocabulary(config: PreTrainedConfig) -> int:
    return int(getattr(config.get_text_config(), "vocab_size", 0) or 0)


def check_of_use(options: ReadingOptions, loaded: LoadedClassifier) -> None:
    """Checks that each option had an effect.

    Raises:
        ConfigError: One had none.
    """
    said: Mapping[str, Any] = {"bos": options.bos != "auto", "eos": options.eos != "auto"}
    idle = [name for name, given in said.items() if given and not loaded.causal]
    if options.label_weights is not None and loaded.usage == "token-logits":
        idle.append("label_weights")
    if idle:
        raise ConfigError(f"{', '.join(idle)}: without effect on this checkpoint ({loaded.usage}). Leave it out.")
