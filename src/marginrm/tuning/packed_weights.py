"""Weights laid out beforehand as oneDNN's kernels read them, for scoring on CPUs.

A plain linear layer's product reads its weights in an order that suits the kernel less, or lays them out anew in each
pass. The layers' own weights are given up for the packed ones, so memory stays what it was. Whether it pays is a matter
of processor and dtype: a trial on the model's largest layer decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marginrm.errors import ModelError
from marginrm.forward.module import RewardModule
from marginrm.tuning.timing import best_seconds

# torch.compile's own, and private: other versions may lack them.
_OPERATORS = "_reorder_linear_weight", "_linear_pointwise"
_ROWS = 256  # tokens of the trial
_PACKED = "this model's weights are packed for scoring, so they can be neither read nor trained."
_WORTH_IT = 1.03  # times the plain layer's speed, from which on weights are packed


def pack_weights(module: RewardModule) -> None:
    """Packs the weights of a module's linear layers where that is faster, and notes it in `weights_reason`.

    Args:
        module: Loaded for scoring. On a CPU it is changed in place: it has to stay there, gives no gradients, and its
            weights can no longer be read or saved.
    """
    layers = [part for part in module.backbone.modules() if type(part) is nn.Linear]
    if not layers or module.device.type != "cpu" or not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS):
        return
    speedup = _speedup(max(layers, key=lambda layer: layer.weight.numel()))
    if speedup < _WORTH_IT:
        return
    module.weights_reason = f"weights packed for oneDNN ({speedup:.2f}x the plain layer's speed in a trial)"
    for layer in layers:
        layer.forward = packed(layer)  # type: ignore[method-assign,assignment]
        # Whoever reads them all the same gets NaN, not a wrong number; one value stands for all.
        layer.weight = nn.Parameter(layer.weight.new_full((1, 1), torch.nan).expand_as(layer.weight), False)
    # A checkpoint's file is mapped as a whole: it goes when nothing reads from it any more.
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.untyped_storage().nbytes() >= tensor.nbytes:  # the values that stand for weights have less
            tensor.data = tensor.data.clone()
    for part in module.modules():
        part.register_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def packed(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Returns a layer's forward pass on a packed copy of its weights."""
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)  # noqa: SLF001 - as torch.compile
    return partial(_linear, weight, layer.bias)


def _linear(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    if torch.is_grad_enabled() and inputs.requires_grad:
        raise ModelError(f"Gradients: {_PACKED} Use one that was loaded for training.")
    # torch.compile knows this operator with weights that it packed itself only, and takes one of ours as it is.
    return _opaque(weight, bias, inputs) if torch.compiler.is_compiling() else _product(weight, bias, inputs)


def _product(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    product = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")  # noqa: SLF001
    return cast("Tensor", product)


@torch.library.custom_op("marginrm::packed_linear", mutates_args=())
def _opaque(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return _product(weight, bias, inputs)


@_opaque.register_fake
def _(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


def _speedup(layer: nn.Linear) -> float:
    """Returns how many times as fast a layer is with packed weights."""
    inputs = torch.randn(_ROWS, layer.in_features, dtype=layer.weight.dtype)
    on_packed = packed(layer)
    with torch.inference_mode():
        plain, quick = best_seconds(lambda: F.linear(inputs, layer.weight, layer.bias), lambda: on_packed(inputs))
    return plain / quick


def _refuse(*_: object) -> None:
    raise ModelError(f"Weights to save: {_PACKED} Save one that was loaded for training.")
