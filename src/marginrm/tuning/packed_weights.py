"""Weights packed beforehand into the layout that a kernel reads, for scoring on CPUs: oneDNN's, or that for AMX.

A plain linear layer's product reads its weights in an order that suits the kernel less, or reorders them in each pass.
The layers' own weights are dropped for the packed ones, so memory use stays the same. The gain depends on processor and
dtype: a trial on the model's largest layer decides between plain and packed weights. Where the kernel for matrix tiles
(`amx.products`) runs, another trial of each shape of weights decides between it and oneDNN's.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from statistics import geometric_mean
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marginrm.amx import products
from marginrm.amx.kernels import KernelUnavailableError, load_kernels, supported
from marginrm.errors import ModelError
from marginrm.forward.execution import Choice
from marginrm.forward.module import RewardModule
from marginrm.forward.self_check import probe_rewards
from marginrm.tuning.timing import best_seconds

# Private operators of torch.compile: other versions of torch may not have them.
_OPERATORS = "_reorder_linear_weight", "_linear_pointwise"
_ROWS = 256  # tokens of the trial
_TILE_ROWS = 256, 1_024  # those of the trial between oneDNN and tiles
# Layers of a shape in that trial, so that a core's own caches do not hold their weights, as in a forward pass.
_TILE_LAYERS = 4
_TILE_TOLERANCE = 2**-6  # of the largest result: both round sums of float32 to bfloat16
_PACKED = "this model's weights are packed for scoring, so they can be neither read nor trained."
_WORTH_IT = 1.03  # speed relative to the plain layer from which on weights are packed, and relative to oneDNN for tiles

Shape = tuple[int, int]  # in, out


def try_it(module: RewardModule) -> Choice:
    """Packs the weights of a module's linear layers if that is faster on this machine. It cannot be undone.

    Args:
        module: Loaded for scoring. On a CPU it is changed in place: it has to stay there, gives no gradients, and its
            weights can no longer be read or saved.
    """
    if module.execution.weights == "packed":
        return Choice(True, "weights packed for oneDNN")
    layers = [part for part in module.backbone.modules() if type(part) is nn.Linear]
    if not layers or module.device.type != "cpu" or not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS):
        return Choice(False, "")
    speed = _speed(max(layers, key=lambda layer: layer.weight.numel()))
    tiled, reason = _tiled(layers)
    if speed < _WORTH_IT:
        layers = [layer for layer in layers if takes_tiles(layer, tiled)]
        if not layers:
            return Choice(False, reason)
    layers = only_called(module, layers)
    if not layers:
        return Choice(False, "weights not packed: the model reads them other than by its linear layers' forward")
    apply(module, layers, tiled)
    onednn = any(not takes_tiles(layer, tiled) for layer in layers)
    packed = (
        f"weights packed for oneDNN ({speed:.2f}x the plain layer's speed in a trial)" if onednn else "weights packed"
    )
    return Choice(True, "; ".join(filter(None, (packed, reason))))


def only_called(module: RewardModule, layers: list[nn.Linear]) -> list[nn.Linear]:
    """Returns those of some layers whose weights a forward pass reads by calling the layer, and in no other way.

    Mamba layers multiply by `dt_proj.weight` themselves. A probe in which reading a weight yields NaN shows it.
    """
    for _ in range(2):
        called: set[nn.Linear] = set()
        kept = [layer.weight for layer in layers]
        for layer in layers:
            layer.forward = partial(_noted, called, layer, layer.weight)  # type: ignore[method-assign]
            _give_up(layer)
        try:
            rewards = probe_rewards(module)
        except Exception:  # noqa: BLE001 - own code raises errors of any class, for instance of probes without its marks
            return []
        finally:
            for layer, weight in zip(layers, kept, strict=True):
                del layer.forward
                layer.weight = weight
        layers = [layer for layer in layers if layer in called]
        if not rewards.isnan().any():
            return layers
    return []


def _noted(called: set[nn.Linear], layer: nn.Linear, weight: Tensor, inputs: Tensor) -> Tensor:
    called.add(layer)
    return F.linear(inputs, weight, layer.bias)


def _give_up(layer: nn.Linear) -> None:
    """Makes reading a layer's weights yield NaN, not stale numbers (one expanded value, so no memory)."""
    layer.weight = nn.Parameter(layer.weight.new_full((1, 1), torch.nan).expand_as(layer.weight), False)


def apply(module: RewardModule, layers: list[nn.Linear], tiled: Collection[Shape] = ()) -> None:
    """Packs the weights of linear layers, and makes the module refuse to be saved.

    Args:
        module: Changed in place.
        layers: Linear layers of it.
        tiled: The shapes of weights that are packed into tiles; others are packed for oneDNN.
    """
    for layer in layers:
        PackedLinear.convert(layer, packed_weight(layer, tiled))
    # A checkpoint's file is mapped as a whole: its memory is freed when no tensor reads from it any more.
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.untyped_storage().nbytes() >= tensor.nbytes:  # expanded values have less
            tensor.data = tensor.data.clone()
    for part in module.modules():
        part.register_state_dict_pre_hook(_refuse)
    module.execution = replace(module.execution, weights="packed")


class PackedLinear(nn.Linear):
    """A linear layer whose product reads a packed copy of its weights.

    It is a class, so that `torch.compile` sees the same code in every layer, and the weights as its inputs.

    Attributes:
        packed: The weights in oneDNN's layout, or in tiles.
    """

    packed: Tensor

    @property
    def tiled(self) -> bool:
        """Whether the weights are in tiles."""
        return _in_tiles(self.packed)

    @classmethod
    def convert(cls, layer: nn.Linear, packed: Tensor) -> PackedLinear:
        """Makes a plain linear layer a packed one, in place: other modules may refer to it.

        Args:
            layer: The layer.
            packed: Its weights, as `packed_weight` gives them.
        """
        _give_up(layer)
        layer.__class__ = cls
        converted = cast("PackedLinear", layer)
        converted.packed = packed
        return converted

    def forward(self, inputs: Tensor) -> Tensor:
        """Computes the product, as `nn.Linear` does.

        Raises:
            ModelError: Gradients are wanted.
            ValueError: The inputs have another size.
        """
        if inputs.shape[-1] != self.in_features:
            raise ValueError(f"inputs have {inputs.shape[-1]} numbers, and this layer takes {self.in_features}.")
        if torch.is_grad_enabled() and inputs.requires_grad:
            raise ModelError(f"Gradients: {_PACKED} Use one that was loaded for training.")
        if torch.compiler.is_compiling():
            # torch.compile accepts oneDNN's operator only for weights that it packed itself, so it gets one of ours.
            return cast("Tensor", _opaque(self.packed, self.bias, inputs, self.out_features))
        return product(self.packed, self.bias, inputs, self.out_features)


def shape_of(layer: nn.Linear) -> Shape:
    """Returns the shape by which a layer's form is chosen."""
    return layer.in_features, layer.out_features


def takes_tiles(layer: nn.Linear, tiled: Collection[Shape]) -> bool:
    """Says if a plain layer's weights are packed into tiles, given the shapes that are."""
    return layer.weight.dtype == torch.bfloat16 and shape_of(layer) in tiled


def packed_weight(layer: nn.Linear, tiled: Collection[Shape] = ()) -> Tensor:
    """Returns a copy of a layer's weights: [panels, steps, 1024] in tiles, or [out, in] in oneDNN's layout.

    Args:
        layer: The layer.
        tiled: The shapes of bfloat16 weights that are packed into tiles.
    """
    weight = layer.weight.detach()
    if takes_tiles(layer, tiled):
        return products.pack(weight)
    return cast("Tensor", torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS))  # noqa: SLF001 - as torch.compile


def _in_tiles(packed: Tensor) -> bool:
    return packed.dim() == 3


def product(weight: Tensor, bias: Tensor | None, inputs: Tensor, out_features: int) -> Tensor:
    """Returns inputs times weights plus bias, [..., out].

    Args:
        weight: As `packed_weight` gives it.
        bias: [out].
        inputs: [..., in].
        out_features: Number of columns.
    """
    if _in_tiles(weight):
        return products.multiply(weight, bias, inputs, out_features)
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], ""))  # noqa: SLF001


@torch.library.custom_op("marginrm::packed_linear", mutates_args=())
def _opaque(weight: Tensor, bias: Tensor | None, inputs: Tensor, out_features: int) -> Tensor:
    return product(weight, bias, inputs, out_features)


@_opaque.register_fake
def _(_weight: Tensor, _bias: Tensor | None, inputs: Tensor, out_features: int) -> Tensor:
    # Sizes of weights are unknowns of a graph that serves rows of any length, and module attributes are not. With a number,
    # the compiled loops have constant bounds.
    return inputs.new_empty(*inputs.shape[:-1], out_features)


def _speed(layer: nn.Linear) -> float:
    """Returns the speed of a layer with packed weights relative to the plain layer."""
    inputs = torch.randn(_ROWS, layer.in_features, dtype=layer.weight.dtype)
    weight = packed_weight(layer)
    with torch.inference_mode():
        plain, quick = best_seconds(
            lambda: F.linear(inputs, layer.weight, layer.bias),
            lambda: product(weight, layer.bias, inputs, layer.out_features),
        )
    return plain / quick


def _tiled(layers: list[nn.Linear]) -> tuple[set[Shape], str]:
    """Finds out which shapes of weights are faster in tiles, and says so."""
    shapes: dict[Shape, list[nn.Linear]] = {}
    for layer in layers:
        if layer.weight.dtype == torch.bfloat16:
            shapes.setdefault(shape_of(layer), []).append(layer)
    if not shapes or not supported():
        return set(), ""
    try:
        load_kernels()
    except KernelUnavailableError as error:
        return set(), f"no products by matrix tiles (AMX), since {error}"
    speeds = {shape: _tile_speed(same[:_TILE_LAYERS]) for shape, same in shapes.items()}
    known = [speed for speed in speeds.values() if speed is not None]
    tiled = {shape for shape, speed in speeds.items() if speed is not None and speed >= _WORTH_IT}
    reason = f"products by matrix tiles (AMX) for {len(tiled)} of {len(speeds)} shapes of weights"
    if known:
        reason += f" ({min(known):.2f} to {max(known):.2f}x oneDNN's speed in a trial)"
    if len(known) < len(speeds):
        reason += f", since results differ for {len(speeds) - len(known)}"
    return tiled, reason


def _tile_speed(layers: list[nn.Linear]) -> float | None:
    """Returns the speed of some layers of a shape with weights in tiles relative to oneDNN's; None if results differ."""
    first = layers[0]
    rows = torch.randn(max(_TILE_ROWS), first.in_features).to(first.weight.dtype)
    forms = [[(packed_weight(layer, tiled), layer.bias) for layer in layers] for tiled in ((), {shape_of(first)})]

    def results(form: Sequence[tuple[Tensor, Tensor | None]], count: int) -> list[Tensor]:
        return [product(weight, bias, rows[:count], first.out_features) for weight, bias in form]

    with torch.inference_mode():
        expected, found = (results(form, len(rows))[0].float() for form in forms)
        if not (found - expected).abs().max() <= _TILE_TOLERANCE * expected.abs().max():
            return None
        seconds = best_seconds(*(partial(results, form, count) for count in _TILE_ROWS for form in forms))
    return geometric_mean(onednn / tiles for onednn, tiles in zip(seconds[::2], seconds[1::2], strict=True))


def _refuse(*_: object) -> None:
    raise ModelError(f"Weights to save: {_PACKED} Save one that was loaded for training.")
