"""Less memory for activations: what costs little to compute again is not kept for the backward pass.

Autograd keeps four tensors of the MLP's width for each gated MLP, and of each RMSNorm its input, its normalised input
and, under autocast, one half-precision copy for each projection that reads the result. Here an MLP keeps its input
only and is computed again in the backward pass (T. Chen et al., arXiv 1604.06174, applied to this part alone); an
RMSNorm keeps its input and one number per token.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from marginrm.forward.module import RewardModule
from marginrm.forward.self_check import probe_rewards

_MLP, _NORM = "MLP", "RMSNorm"  # endings of transformers' class names


def save_activations(module: RewardModule, *, recompute_mlps: bool) -> None:
    """Makes a tuned module keep less for its backward pass, and adds that to its `forward_reason`.

    Call it under the autocast of the run. A second call changes nothing.

    Args:
        module: Changed in place.
        recompute_mlps: Whether MLPs keep their input only and are computed again.
    """
    norms = share_norms(module)
    mlps = recompute_mlps_of(module) if recompute_mlps else 0
    reasons = [f"{norms} norms keep their input alone"] if norms else []
    reasons += [f"{mlps} MLPs are computed again in the backward pass"] if mlps else []
    module.execution = module.execution.because(", ".join(reasons))


def recompute_mlps_of(module: RewardModule) -> int:
    """Lets the MLPs of a module keep nothing but their input; rewards and gradients stay the same to the bit.

    Returns:
        The number of MLPs.
    """
    parts = [part for part in module.base.modules() if type(part).__name__.endswith(_MLP)]
    for part in parts:
        if not isinstance(part.forward, RecomputedForward):
            part.forward = RecomputedForward(part)
    return len(parts)


def share_norms(module: RewardModule) -> int:
    """Computes the RMSNorms of a module by `RootMeanSquare`, if they give the same.

    Under autocast the result is cast once, where each projection would cast and keep a copy of its own. The gradients of
    the projections are then added in half precision, as in a model of half precision. This is taken only if the rewards
    of a probe stay the same to the bit: a norm whose result goes elsewhere than to matrix products would change them.

    Returns:
        The number of norms.
    """
    norms = [part for part in module.base.modules() if type(part).__name__.endswith(_NORM)]
    if any(isinstance(norm.forward, NormForward) for norm in norms):
        return sum(isinstance(norm.forward, NormForward) for norm in norms)
    before = probe_rewards(module)
    norms = [norm for norm in norms if _is_plain(norm)]
    last = getattr(module.backbone, "norm", None)  # its result goes to the head, in float32
    width = getattr(module.config, "hidden_size", None)
    for norm in norms:
        norm.forward = NormForward(norm, cast=norm is not last and norm.weight.shape == (width,))
    if not torch.equal(probe_rewards(module), before):
        for norm in norms:
            norm.forward = NormForward(norm, cast=False)
    return len(norms)


class KeptBytes(TorchDispatchMode):
    """Counts the bytes of the results of operations that are still held, such as those kept for a backward pass.

    Each storage counts once. The weights of a module do not count, as no operation makes them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and notes the storages of its results; a view has the storage of its base."""
        result = func(*args, **(kwargs or {}))
        own = {StorageWeakRef(one.untyped_storage()) for one in args if isinstance(one, nn.Parameter)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and (held := StorageWeakRef(tensor.untyped_storage())) not in own:
                self._storages[held] = tensor.untyped_storage().nbytes()
        return result

    @property
    def total(self) -> int:
        """The bytes that are held now."""
        sizes = [size for held, size in self._storages.items() if not held.expired()]
        return sum(sizes)


class RecomputedForward:
    """The forward pass of a module that keeps its input only, and runs again in the backward pass.

    Args:
        part: The module.
    """

    def __init__(self, part: nn.Module) -> None:
        self._part = part
        self._forward = part.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module."""
        if not (self._part.training and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)


class NormForward:
    """The forward pass of an RMSNorm by `RootMeanSquare`.

    Args:
        norm: The module.
        cast: Whether the result takes the dtype of autocast.
    """

    def __init__(self, norm: nn.Module, *, cast: bool) -> None:
        self._norm: Any = norm
        self._cast = cast

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Returns the normalised hidden states, [..., size]."""
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if self._cast and torch.is_autocast_enabled(device) else None
        return _root_mean_square(hidden_states, self._norm.weight, self._norm.variance_epsilon, dtype)


def _is_plain(norm: Any) -> bool:
    """Says if a module computes weight * x / rms(x), by a random input; some families add 1 to the weight."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or epsilon is None or weight.dim() != 1:
        return False
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return torch.equal(norm(x), _root_mean_square(x, weight, epsilon, None))


def _root_mean_square(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype | None) -> Tensor:
    return cast("Tensor", RootMeanSquare.apply(x, weight, epsilon, dtype))  # type: ignore[no-untyped-call]


class RootMeanSquare(Function):
    """RMSNorm (arXiv 1910.07467): y = w * x / sqrt(mean(x^2) + epsilon), in float32.

    With s = 1 / sqrt(mean(x^2) + epsilon), n = x * s and g the gradient of y: dw = sum(g * n), and
    dx = s * (g * w - n * mean(g * w * n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype | None) -> Tensor:
        """Returns y, [..., size].

        Args:
            ctx: The context of autograd.
            x: [..., size].
            weight: [size].
            epsilon: As above.
            dtype: Dtype of the result; None for that of the product of weight and input.
        """
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        y = weight * (wide * scale).to(x.dtype)
        return y if dtype is None else y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Returns the gradients of x and weight."""
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        normed = (x.float() * scale).reshape(-1, size)
        wide = gradient.float().reshape(-1, size)
        product = wide * normed
        d_weight = product.sum(0)
        share = torch.mv(product, weight.float()).div_(size)[:, None]
        d_x = torch.addcmul(wide * weight.float(), normed, share, value=-1).mul_(scale.reshape(-1, 1))
        return d_x.view_as(x).to(x.dtype), d_weight.to(weight.dtype), None, None
