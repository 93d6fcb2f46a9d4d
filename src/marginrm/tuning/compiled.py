"""`torch.compile` for a model's layers: one graph for all layers of a kind, and for rows of any length.

A layer's own forward pass is compiled whole, so norms, rotary embedding, gates and residual sums are fused into few
passes. Packed products and attention stay the operators that they are. Attention finds the row of the present forward pass in a
context variable, so the graph depends on no row.

The layers of a kind share one graph because it takes their weights as inputs. A graph that cannot hold the whole layer
is an error (`fullgraph`), so there are no graph breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from marginrm import compiler
from marginrm.attention.interface import packed_attention
from marginrm.attention.layout import AttentionOptions
from marginrm.encoding import EncodedGroup
from marginrm.errors import ConfigError, ModelError
from marginrm.forward.batch import PackedBatch
from marginrm.forward.execution import Choice
from marginrm.forward.module import RewardModule, evaluating
from marginrm.forward.self_check import difference, probe_rewards, tolerance
from marginrm.tuning.last_layer import layers_of
from marginrm.tuning.timing import timed

# Most graphs kept: one for each kind of layer, dtype and form of weights, of all models in the process.
_GRAPHS = 64
# Weights of layers from which on a trial may pay its half a minute of a core; below, a forward pass is short.
_LARGE = 100_000_000
_ROW_MULTIPLE = 64  # tokens, as in `RewardModel`
_ROUNDS = 3  # runs of each forward pass in a trial
_WORTH_IT = 1.03  # speed relative to the eager forward from which on compiled layers are taken
_NONE: Any = None  # the attention function needs its module for padded batches only

_row: ContextVar[PackedBatch] = ContextVar("row")  # the packed batch of the present forward pass


def try_it(module: RewardModule) -> Choice:
    """Compiles a module's layers for scoring, and checks that rewards stay the same.

    It is tried only on request, so a failure is an error. It takes seconds with a warm cache (`compiler.use_cache_folder`), and
    about half a minute without.

    Args:
        module: Loaded for scoring; changed in place.

    Raises:
        ConfigError: The compiler does not work here, such as without a C++ compiler.
        ModelError: The model has no layers to compile, or rewards change.
    """
    missing = obstacle(module)
    if missing is not None:
        raise ConfigError(f"This model cannot be compiled: {missing}. Go without --compile.")
    before = probe_rewards(module)
    apply(module)
    try:
        worst = difference(probe_rewards(module), before)
    except Exception as error:  # the compiler raises errors of any class
        undo(module)
        raise ConfigError(
            f"torch.compile does not work here: {_shown(error)} It needs a C++ compiler (g++) on CPUs; or serve without "
            "--compile."
        ) from error
    if not worst <= tolerance(module):
        undo(module)
        raise ModelError(f"Compiled, this model's rewards differ by {worst:.2g} in a probe. Go without --compile.")
    return Choice(True, "layers compiled")


def trial(module: RewardModule, groups: Sequence[EncodedGroup]) -> Generator[None, None, Choice]:
    """Compiles a module's layers, checks and times them, and keeps them only if they are faster.

    Each pause between two pieces leaves the module as it was, so that other forward passes may run in between. A piece
    takes about as long as a forward pass over the groups; the first that is compiled takes seconds with a warm cache.

    Args:
        module: Loaded for scoring. It is changed in place, in the last piece only.
        groups: Their row is timed.

    Yields:
        None, after each piece.

    Returns:
        What became of it.
    """
    compiler.use_cache_folder()
    before = probe_rewards(module)
    yield
    try:
        with switched_on(module):
            worst = difference(probe_rewards(module), before)
    except Exception as error:  # noqa: BLE001 - the compiler raises errors of any class, and the eager layers work
        return Choice(False, f"layers not compiled, since torch.compile failed ({_shown(error)})")
    yield
    if not worst <= tolerance(module):
        return Choice(False, f"layers not compiled, since rewards would differ by {worst:.2g} in a probe")
    batch = module.collate(groups, multiple=_ROW_MULTIPLE).to(module.device)
    eager, compiled = [], []
    for _ in range(_ROUNDS):
        eager.append(timed(lambda: _rewards(module, batch)))
        yield
        with switched_on(module):
            compiled.append(timed(lambda: _rewards(module, batch)))
        yield
    speed = min(eager) / min(compiled)
    if speed < _WORTH_IT:
        return Choice(False, f"layers not compiled ({speed:.2f}x the eager forward's speed in a trial)")
    apply(module)
    return Choice(True, f"layers compiled ({speed:.2f}x the eager forward's speed in a trial)")


def may_pay(module: RewardModule) -> bool:
    """Returns whether compilation is worth a trial unasked: for a large model on a CPU that is not compiled yet."""
    execution = module.execution
    if module.device.type != "cpu" or execution.tile is not None or execution.compiled:
        return False
    weights = sum(weight.numel() for layer in layers_of(module) for weight in layer.parameters())
    return weights >= _LARGE and obstacle(module) is None


def obstacle(module: RewardModule) -> str | None:
    """Returns what rules compilation out before it is tried, or None."""
    if module.forward_path != "packed":
        return "only packed rows are compiled"
    if not _layers(module):
        return "it does not say which modules its layers are"
    return compiler.obstacle()


@contextmanager
def switched_on(module: RewardModule) -> Iterator[None]:
    """Compiles a module's layers for a while."""
    apply(module)
    try:
        yield
    finally:
        undo(module)


def apply(module: RewardModule) -> None:
    """Makes layers compile at their first call. A last layer that runs at the reward tokens only stays as it is."""
    for layer in _layers(module):
        layer.forward = CompiledLayer(layer)
    module.execution = replace(module.execution, compiled=True)


def undo(module: RewardModule) -> None:
    """Gives layers their own forward pass back, if it was replaced."""
    for layer in layers_of(module):
        if isinstance(layer.forward, CompiledLayer):
            del layer.forward
    module.execution = replace(module.execution, compiled=False)


def _layers(module: RewardModule) -> list[nn.Module]:
    """Returns the layers with their own forward pass; a last layer that is cut to the reward tokens has another."""
    return [layer for layer in layers_of(module) if "forward" not in vars(layer)]


class CompiledLayer:
    """The forward pass of a layer, compiled for packed rows in inference mode, and eager elsewhere.

    Args:
        layer: It takes hidden states first, and `packed_batch` among its keyword arguments.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, *args: Any, packed_batch: PackedBatch | None = None, **kwargs: Any) -> Any:
        """Runs the layer."""
        if packed_batch is None or not torch.is_inference_mode_enabled():
            return _whole(self._layer, *args, packed_batch=packed_batch, **kwargs)
        token = _row.set(packed_batch)
        try:
            return _compiled()(self._layer, *args, packed_batch=_STAND_IN, **kwargs)
        finally:
            _row.reset(token)


def _whole(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


@cache
def _compiled() -> Callable[..., Any]:
    """Returns the compiled function; one for all layers of all models, since graphs are found by their code."""
    compiled: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]  # torch's stubs lack the limit
        _whole, dynamic=True, fullgraph=True, recompile_limit=_GRAPHS
    )
    return compiled


class _GraphLayout:
    """A layout whose attention is one operator of the graph."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, cached: Sequence[Any] = ()
    ) -> Tensor:
        """Computes a layer's attention over the row of the present forward pass, its cached prefixes included."""
        del cached  # the operator asks the row itself
        result: Tensor = _attend(query, key, value, options.sinks, options.scale, options.window, options.softcap)
        return result


class _StandIn:
    """Takes the place of a packed batch in a graph."""

    layout = _GraphLayout()
    prefixes = None


_STAND_IN: Any = _StandIn()


@torch.library.custom_op("marginrm::attend", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    options: dict[str, Any] = {"scaling": scale, "sliding_window": window, "softcap": softcap, "s_aux": sinks}
    result, _ = packed_attention(_NONE, query, key, value, None, packed_batch=_row.get(), **options)
    return result.contiguous()


@_attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _rewards(module: RewardModule, batch: Any) -> Tensor:
    with torch.inference_mode(), evaluating(module):
        rewards: Tensor = module(batch).cpu()  # waits for the device
        return rewards


def _shown(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
