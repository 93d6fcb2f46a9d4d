"""Weights packed beforehand into the layout that oneDNN's kernels read, for scoring on CPUs.

A plain linear layer's product reads its weights in an order that suits the kernel less, or reorders them in each pass.
The layers' own weights are dropped for the packed ones, so memory use stays the same. The gain depends on processor and
dtype: a trial on the model's largest layer decides.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marginrm.errors import ModelError
from marginrm.forward.execution import Choice
from marginrm.forward.module import RewardModule
from marginrm.forward.self_check import probe_rewards
from marginrm.tuning import row_splits
from marginrm.tuning.timing import best_seconds

# Private operators of torch.compile: other versions of torch may not have them.
_OPERATORS = "_reorder_linear_weight", "_linear_pointwise"
_ROWS = 256  # tokens of the trial
_PACKED = "this model's weights are packed for scoring, so they can be neither read nor trained."
_WORTH_IT = 1.03  # speed relative to the plain layer from which on weights are packed


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
    if speed < _WORTH_IT:
        return Choice(False, "")
    layers = only_called(module, layers)
    if not layers:
        return Choice(False, "weights not packed: the model reads them other than by its linear layers' forward")
    apply(module, layers)
    parts = "; some products in two parts" if _measured(module) else ""
    return Choice(True, f"weights packed for oneDNN ({speed:.2f}x the plain layer's speed in a trial){parts}")


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


def apply(module: RewardModule, layers: list[nn.Linear]) -> None:
    """Packs the weights of linear layers, and makes the module refuse to be saved."""
    for layer in layers:
        PackedLinear.convert(layer)
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
        packed: The weights in oneDNN's layout.
    """

    packed: Tensor

    @classmethod
    def convert(cls, layer: nn.Linear, packed: Tensor | None = None) -> PackedLinear:
        """Makes a plain linear layer a packed one, in place: other modules may refer to it.

        Args:
            layer: The layer.
            packed: Its weights in oneDNN's layout, if they are there already.
        """
        packed = reordered(layer) if packed is None else packed
        _give_up(layer)
        layer.__class__ = cls
        converted = cast("PackedLinear", layer)
        converted.packed = packed
        return converted

    def forward(self, inputs: Tensor) -> Tensor:
        """Computes the product, as `nn.Linear` does.

        Raises:
            ModelError: Gradients are wanted.
        """
        if torch.is_grad_enabled() and inputs.requires_grad:
            raise ModelError(f"Gradients: {_PACKED} Use one that was loaded for training.")
        if torch.compiler.is_compiling():
            # torch.compile accepts oneDNN's operator only for weights that it packed itself, so it gets one of ours.
            return cast("Tensor", _opaque(self.packed, self.bias, inputs, self.out_features))
        return _product(self.packed, self.bias, inputs)


def reordered(layer: nn.Linear) -> Tensor:
    """Returns a copy of a layer's weights in oneDNN's layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)  # noqa: SLF001 - as torch.compile
    return cast("Tensor", packed)


def _measured(module: RewardModule) -> bool:
    """Finds out which products are faster in two parts; returns whether some are."""
    layers = [part for part in module.backbone.modules() if isinstance(part, PackedLinear)]
    products = {
        (layer.weight.dtype, layer.in_features, layer.out_features): partial(_whole, layer.packed, layer.bias)
        for layer in layers
    }
    with torch.inference_mode():
        return row_splits.measure(products)


def _product(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return row_splits.in_parts(partial(_whole, weight, bias), inputs, weight.shape[0])


def _whole(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    product = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")  # noqa: SLF001
    return cast("Tensor", product)


@torch.library.custom_op("marginrm::packed_linear", mutates_args=())
def _opaque(weight: Tensor, bias: Tensor | None, inputs: Tensor, out_features: int) -> Tensor:
    return _product(weight, bias, inputs)


@_opaque.register_fake
def _(_weight: Tensor, _bias: Tensor | None, inputs: Tensor, out_features: int) -> Tensor:
    # Sizes of weights are unknowns of a graph that serves rows of any length, and module attributes are not. With a number,
    # the compiled loops have constant bounds.
    return inputs.new_empty(*inputs.shape[:-1], out_features)


def _speed(layer: nn.Linear) -> float:
    """Returns the speed of a layer with packed weights relative to the plain layer."""
    inputs = torch.randn(_ROWS, layer.in_features, dtype=layer.weight.dtype)
    weight = reordered(layer)
    with torch.inference_mode():
        plain, quick = best_seconds(
            lambda: F.linear(inputs, layer.weight, layer.bias), lambda: _product(weight, layer.bias, inputs)
        )
    return plain / quick


def _refuse(*_: object) -> None:
    raise ModelError(f"Weights to save: {_PACKED} Save one that was loaded for training.")
