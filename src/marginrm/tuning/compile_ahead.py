"""`python -m marginrm.tuning.compile_ahead`: fills the compiler's cache for a model, in a process of its own.

It reads one `Skeleton`, a line of JSON, from standard input, builds the backbone without its weights, and runs its
compiled layers once. Compilation is Python and g++ for half a minute. In a process of low priority it takes little from
the forward passes of the process that serves the model. The graph takes weights as inputs, so that process finds it in
the cache. The process ends when its standard input is closed, so it does not outlive the one that serves.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from marginrm.attention.interface import ATTENTION_NAME
from marginrm.compiler import use_cache_folder
from marginrm.encoding import Architecture
from marginrm.forward.module import RewardModule
from marginrm.forward.own_forward import is_own_code
from marginrm.forward.pooling import Pooling, ResponseBounds
from marginrm.forward.self_check import probe_rewards
from marginrm.tuning import compiled
from marginrm.tuning.last_layer import layers_of
from marginrm.tuning.packed_weights import PackedLinear, Shape, packed_weight, shape_of

_NICE = 10  # lower still, it would hardly run beside a busy server


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model without its weights, as far as its compiled layers depend on it.

    Attributes:
        config: The backbone's configuration, as in config.json.
        dtype: Its dtype, such as `bfloat16`.
        architecture: Decoder or encoder.
        max_length: The longest sequence in tokens.
        packed: Input and output size of the weights that are packed for oneDNN.
        tiled: Those of the weights that are packed into tiles.
        threads: Threads of a forward pass; they decide how loops are split.
    """

    config: dict[str, Any]
    dtype: str
    architecture: Architecture
    max_length: int
    packed: tuple[Shape, ...]
    tiled: tuple[Shape, ...]
    threads: int

    @classmethod
    def of(cls, module: RewardModule) -> Skeleton | None:
        """Returns the skeleton of a module; None for own code, which another process cannot be given."""
        if is_own_code(module.base):
            return None
        layers = [part for part in module.backbone.modules() if isinstance(part, PackedLinear)]
        return cls(
            json.loads(module.base.config.to_json_string(use_diff=False)),
            str(module.dtype).removeprefix("torch."),
            module.architecture,
            module.max_length,
            _shapes(part for part in layers if not part.tiled),
            _shapes(part for part in layers if part.tiled),
            torch.get_num_threads(),
        )

    @classmethod
    def from_json(cls, text: str) -> Skeleton:
        """Returns the skeleton that `to_json` wrote."""
        fields = json.loads(text)
        shapes = {name: tuple((given, result) for given, result in fields[name]) for name in ("packed", "tiled")}
        return cls(**fields | shapes)

    def to_json(self) -> bytes:
        """Returns the skeleton as JSON."""
        return json.dumps(asdict(self)).encode()


def _shapes(layers: Iterable[nn.Linear]) -> tuple[Shape, ...]:
    return tuple(sorted({shape_of(layer) for layer in layers}))


def build(skeleton: Skeleton) -> RewardModule:
    """Builds a module on CPU whose layers compile to the same graphs; its rewards mean nothing."""
    fields = dict(skeleton.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        backbone = AutoModel.from_config(config, dtype=getattr(torch, skeleton.dtype)).eval()
    backbone.set_attn_implementation(ATTENTION_NAME)
    module = RewardModule(
        backbone,
        max_length=skeleton.max_length,
        pooling=Pooling("last" if skeleton.architecture == "decoder" else "first", (), _first_value),
        forward_path="packed",
        path_reason="",
        architecture=skeleton.architecture,
    )
    places = {part: name for layer in layers_of(module) for name, part in layer.named_modules()}
    _fill(backbone, places)
    packed: dict[tuple[object, torch.Size], Tensor] = {}
    for layer in [part for part in backbone.modules() if type(part) is nn.Linear]:
        if shape_of(layer) not in (*skeleton.packed, *skeleton.tiled):
            continue
        place = places.get(layer, layer), layer.weight.shape
        if place not in packed:
            packed[place] = packed_weight(layer, skeleton.tiled)
        PackedLinear.convert(layer, packed[place])
    return module.eval()


def _first_value(_model: Any, hidden: Tensor, bounds: ResponseBounds) -> Tensor:
    return hidden[bounds.last, 0].float()


def _fill(backbone: nn.Module, places: Mapping[nn.Module, str]) -> None:
    """Gives weights and buffers zeros for values. Layers share memory, within a layer nothing does, as in a real model.

    Args:
        backbone: Without values.
        places: The name of each part of a layer in its layer.
    """

    @cache
    def zeros(_place: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    for part in backbone.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            if isinstance(part, nn.Embedding):  # not compiled, and may be large
                filled = torch.zeros(1, dtype=weight.dtype).expand(weight.shape)
            else:
                filled = zeros((places.get(part, part), name), tuple(weight.shape), weight.dtype)
            setattr(part, name, nn.Parameter(filled, weight.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def main() -> None:
    """Reads a skeleton and compiles its layers."""
    os.nice(_NICE)
    skeleton = Skeleton.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    torch.set_num_threads(skeleton.threads)
    use_cache_folder()
    module = build(skeleton)
    compiled.apply(module)
    probe_rewards(module)
    os._exit(0)  # the thread that reads is not waited for


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
