"""Tuning: tries each optimisation of a module on this machine, in one fixed order, and keeps what proves itself."""

from __future__ import annotations

from typing import Literal

from marginrm.forward.execution import Choice, Execution
from marginrm.forward.module import RewardModule
from marginrm.tuning import attention, compiled, deterministic, last_layer, packed_weights, prefixes

# Scoring packs weights, which can then be neither trained nor saved; training also compares gradients.
Purpose = Literal["scoring", "compiled_scoring", "deterministic_scoring", "training"]


def tune(module: RewardModule, purpose: Purpose, *, whole_last_layer: bool = False) -> Execution:
    """Chooses how a module computes on the device of its weights.

    Each optimisation is tried, checked against the rewards without it, and taken or undone; `forward_reason` says why.
    Under autocast the trial is autocast's. A module may be tuned again, for another purpose or device.

    Args:
        module: Changed in place; its `execution` is the result.
        purpose: `deterministic_scoring` takes no optimisation that depends on timing, since timing would decide bits.
        whole_last_layer: Keeps the last layer whole, for software that follows the calls of a layer's modules
            (DeepSpeed), as a cut layer runs twice.

    Returns:
        The module's execution.

    Raises:
        ModelError: The module cannot be compiled or made deterministic without changing rewards.
        ConfigError: The compiler does not work on this machine.
    """
    compiled.undo(module)
    last_layer.undo(module)
    deterministic.undo(module)
    kept = module.execution.weights  # packed weights cannot be undone
    module.execution = Execution(module.device.type, weights=kept)
    if purpose == "deterministic_scoring":
        _note(module, deterministic.try_it(module))
        _note(module, prefixes.try_it(module))
        return module.execution
    _note(module, attention.try_it(module, gradients=purpose == "training"))
    if not whole_last_layer:
        _note(module, last_layer.try_it(module))
    if purpose != "training":
        _note(module, packed_weights.try_it(module))
    if purpose == "compiled_scoring":
        _note(module, compiled.try_it(module))
    if purpose != "training":
        _note(module, prefixes.try_it(module))
    return module.execution


def _note(module: RewardModule, choice: Choice) -> None:
    module.execution = module.execution.because(choice.reason)
