"""Finds a reward head among a checkpoint's weights, by their names and shapes, and builds it in float32."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from marginrm.errors import HeadError
from marginrm.loading.files import CheckpointFiles, StoredTensor
from marginrm.reading import Activation, ReadingOptions

_ACTIVATIONS: Mapping[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
# Classes with a head of two layers, by the code that their authors published.
_KNOWN_ACTIVATIONS: Mapping[str, Activation] = {
    "INFORMForSequenceClassification": "relu",  # infly/INF-ORM-Llama3.1-70B: README
    "Qwen2ForProcessRewardModel": "relu",  # Qwen/Qwen2.5-Math-PRM-7B: modeling_qwen2_rm.py
    "Qwen2ForRewardModel": "relu",  # Qwen/Qwen2.5-Math-RM-72B, WorldPM-72B: modeling_qwen2_rm.py
}
# Wrappers whose names trainers leave before those of the weights.
_WRAPPERS = re.compile(r"^(module|_orig_mod|pretrained_model|base_model\.model)\.")
_PARTS = re.compile(r"^(?P<module>.+?)(\.modules_to_save)?\.(?P<part>weight|bias)$")
# Weights that no reward depends on: position tables, causal masks, statistics that the configuration holds as well.
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias|num_batches_tracked)$"
    r"|^(cls|lm_predictions|mask_predictions|generator_lm_head|discriminator_predictions)\."
    r"|^(lm_head|mtp|qa_outputs)\.|(^|\.)pooler\.dense\."
)
_NORMALISERS = re.compile(r"^(mean|std|normalizer\.(mean|var|count))$")
_MOST_ROWS = 256  # heads of published reward models have 1 to 29 rows; a matrix with more is something else


@dataclass(frozen=True, slots=True)
class HeadLayer:
    """A linear layer of a head: the names of its weight and of its bias, if it has one, and its sizes (rows, columns)."""

    weight: str
    bias: str | None
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FoundHead:
    """A head among the weights.

    Attributes:
        name: The first part of its weights' names.
        layers: Its linear layers, in order.
        modules: Their names.
    """

    name: str
    layers: tuple[HeadLayer, ...]
    modules: tuple[str, ...]

    @property
    def rows(self) -> int:
        """The number of values it gives."""
        return self.layers[-1].shape[0]

    def describe(self) -> str:
        """Returns its name, layers and rows in words."""
        sizes = " -> ".join(map(str, [self.layers[0].shape[1], *(one.shape[0] for one in self.layers)]))
        return f"{self.name} ({sizes}{', with bias' if self.layers[-1].bias else ''})"


def is_harmless(name: str, shape: tuple[int, ...], vocabulary: int) -> bool:
    """Returns whether a weight beside a reward head has no influence on rewards, such as a language model's output."""
    bare = bare_name(name)
    is_output = bool(shape) and shape[0] >= max(vocabulary, _MOST_ROWS) and len(shape) <= 2
    return is_output or bool(_HARMLESS.search(bare) or _NORMALISERS.match(bare))


def find_head(
    left_over: Mapping[str, StoredTensor],
    *,
    name: str,
    hidden: AbstractSet[int],
    vocabulary: int,
    prefix: str | None = None,
) -> FoundHead | None:
    """Finds the head among the weights that are not the backbone's.

    Args:
        left_over: Those weights, by name.
        name: The checkpoint, for messages.
        hidden: Sizes that the backbone's hidden states may have.
        vocabulary: Size of the vocabulary: a matrix with so many rows is a language model's output.
        prefix: The head's name, where the configuration says it (OpenRLHF's `value_head_prefix`).

    Returns:
        The head, or None where nothing is left over.

    Raises:
        HeadError: What is left over is not one head; the message names the weights.
    """
    candidates = {key: stored for key, stored in left_over.items() if not is_harmless(key, stored.shape, vocabulary)}
    if prefix and any(_top(key) == prefix for key in candidates):
        candidates = {key: stored for key, stored in candidates.items() if _top(key) == prefix}
    if not candidates:
        return None
    modules: dict[str, dict[str, str]] = {}
    for key in candidates:
        match = _PARTS.match(bare_name(key))
        modules.setdefault(match["module"] if match else key, {})[match["part"] if match else key] = key
    names = tuple(sorted(modules, key=_natural))
    layers = tuple(
        HeadLayer(one["weight"], one.get("bias"), candidates[one["weight"]].shape)
        for one in map(modules.__getitem__, names)
        if "weight" in one
    )
    tops = {_top(one) for one in names}
    if len(layers) != len(names) or len(tops) != 1 or not _is_chain(layers, hidden):
        raise HeadError(_not_one_head(name, candidates, hidden))
    return FoundHead(tops.pop(), layers, names)


def build_head(found: FoundHead, files: CheckpointFiles, options: ReadingOptions) -> nn.Module:
    """Reads a head's weights into a module that gives one value per hidden state.

    Raises:
        HeadError: It has several rows and no weights for them, or two layers and an activation that is not known.
    """
    layers = [
        float32_linear(files.read(one.weight), files.read(one.bias) if one.bias else None) for one in found.layers
    ]
    labels = files.config.get("id2label")
    layers[-1] = one_row(layers[-1], options.label_weights, name=files.name, labels=labels)
    scale = normalisation(files)
    if scale is not None:
        mean, std = scale
        layers[-1] = float32_linear(layers[-1].weight.detach() / std, (_bias(layers[-1]) - mean) / std)
    if len(layers) == 1:
        return layers[0]
    activation = _ACTIVATIONS[_activation(found, files, options)]
    parts: list[nn.Module] = [layers[0]]
    for layer in layers[1:]:
        parts += [activation(), layer]
    return nn.Sequential(*parts)


def one_row(layer: nn.Linear, weights: tuple[float, ...] | None, *, name: str, labels: Any = None) -> nn.Linear:
    """Makes one row of a layer's several: sum of weight x row, which is exact, since the layer is linear.

    Args:
        layer: The last layer of a head.
        weights: A weight for each row; may be None where there is one row.
        name: The checkpoint, for messages.
        labels: The configuration's id2label, for messages.

    Raises:
        HeadError: It has several rows and as many weights are not given.
    """
    rows = layer.out_features
    if rows == 1 and weights is None:
        return layer
    if weights is None:
        shown = f" (id2label: {labels})" if labels else ""
        raise HeadError(
            f"{name} gives {rows} values per sequence{shown}, and a reward is one. Say how they make one: "
            f"--label-weights with {rows} numbers, such as {_example(rows)} (Python: ReadingOptions(label_weights=...)). "
            "Or load a checkpoint with num_labels = 1."
        )
    if len(weights) != rows:
        raise HeadError(f"label_weights has {len(weights)} numbers; the head of {name} has {rows} rows.")
    factors = torch.tensor(weights, dtype=torch.float64)
    weight = factors @ layer.weight.detach().double()
    bias = None if layer.bias is None else factors @ layer.bias.detach().double()
    return float32_linear(weight[None].float(), None if bias is None else bias[None].float())


def normalisation(files: CheckpointFiles) -> tuple[float, float] | None:
    """Returns mean and standard deviation by which the checkpoint normalises its rewards, or None.

    OpenRLHF: `normalize_reward`, `mean` and `std` in config.json, or as weights in older ones
    (openrlhf/models/model.py). PKU's safe-rlhf: `do_normalize`, and `normalizer.mean` and `normalizer.var` as weights.
    """
    config = files.config
    if config.get("normalize_reward"):
        mean, std = (_first(files.read(key) if key in files.tensors else config.get(key)) for key in ("mean", "std"))
        return mean or 0.0, std or 1.0
    if config.get("do_normalize") and "normalizer.mean" in files.tensors:
        return _first(files.read("normalizer.mean")) or 0.0, (_first(files.read("normalizer.var")) or 1.0) ** 0.5
    return None


def _activation(found: FoundHead, files: CheckpointFiles, options: ReadingOptions) -> Activation:
    if options.head_activation is not None:
        return options.head_activation
    if files.class_name in _KNOWN_ACTIVATIONS:
        return _KNOWN_ACTIVATIONS[files.class_name]
    if [name.rpartition(".")[2] for name in found.modules] == ["dense", "out_proj"]:
        return "tanh"  # as in transformers' own heads of these names
    raise HeadError(
        f"{files.name} has a head of several layers ({', '.join(found.modules)}), and nothing in it says which activation "
        "is between them. Say it: --head-activation relu, gelu, silu or tanh (Python: "
        "ReadingOptions(head_activation=...)); the code that trained it has it."
    )


def _not_one_head(checkpoint: str, candidates: Iterable[str], hidden: AbstractSet[int]) -> str:
    names = sorted(candidates, key=_natural)
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    if any("lora_" in name for name in names):
        return f"{checkpoint} has LoRA matrices that were not merged: {shown}. Merge them (peft: merge_and_unload) and save again."
    sizes = " or ".join(map(str, sorted(hidden)))
    return (
        f"{checkpoint} holds weights that have no place in a backbone with one reward head on hidden states of {sizes}: {shown}. "
        "Loaded without them, its rewards would be wrong. If a class of its own reads them, fetch its code too (auto_map in "
        "config.json) and let it run: --trust-remote-code."
    )


def _is_chain(layers: tuple[HeadLayer, ...], hidden: AbstractSet[int]) -> bool:
    shapes = [one.shape for one in layers]
    fits = all(len(shape) == 2 for shape in shapes) and shapes[0][1] in hidden and shapes[-1][0] <= _MOST_ROWS
    return fits and all(after[1] == before[0] for before, after in pairwise(shapes))


def float32_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Returns a linear layer in float32, which takes hidden states of any dtype."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    layer.register_forward_pre_hook(_in_float32)
    return layer


def _in_float32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(one.float() for one in inputs)


def _bias(layer: nn.Linear) -> Tensor:
    return torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()


def bare_name(name: str) -> str:
    """Returns a weight's name without the wrappers that trainers leave before it."""
    while (shorter := _WRAPPERS.sub("", name)) != name:
        name = shorter
    return name


def _top(name: str) -> str:
    return bare_name(name).partition(".")[0]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _first(value: Any) -> float:
    if isinstance(value, Tensor):
        return float(value.flatten()[0])
    return float(value[0] if isinstance(value, list) else value or 0.0)


def _example(rows: int) -> str:
    return "-1,1" if rows == 2 else ",".join(["1", *["0"] * (rows - 1)])
