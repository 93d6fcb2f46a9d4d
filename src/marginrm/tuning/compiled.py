"""`torch.compile` for the small parts of a model, between its matrix products.

Normalisation, rotary embedding and MLP are one function each for all layers, so three or four kernels serve the whole
model, and any number of tokens. Attention stays as it is.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from marginrm.errors import ConfigError, ModelError
from marginrm.forward.execution import Choice
from marginrm.forward.module import RewardModule
from marginrm.forward.self_check import difference, probe_rewards, tolerance

_PARTS = ("RMSNorm", "MLP")  # endings of transformers' class names
_ROTARY = "apply_rotary_pos_emb"


def try_it(module: RewardModule) -> Choice:
    """Compiles a module's normalisation, rotary embedding and MLP for scoring, and checks that rewards stay the same.

    It is tried only on request, so a failure is an error. It cannot be undone. It takes seconds with a warm cache
    (`TORCHINDUCTOR_CACHE_DIR`, by default ~/.cache/marginrm/inductor) and about half a minute without.

    Args:
        module: Loaded for scoring; changed in place.

    Raises:
        ConfigError: The compiler does not work here, such as without a C++ compiler.
        ModelError: Rewards change.
    """
    if module.execution.compiled:
        return Choice(True, "compiled between matrix products")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "marginrm" / "inductor"))
    before = probe_rewards(module)
    apply(module)
    try:
        after = probe_rewards(module)
    except TorchDynamoException as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"torch.compile does not work here: {reason} It needs a C++ compiler (g++) on CPUs; or serve without --compile."
        ) from error
    worst = difference(after, before)
    if not worst <= tolerance(module):
        raise ModelError(
            f"Compiled, this model's rewards differ by {worst:.2g} in a probe. Serve it without --compile."
        )
    return Choice(True, "compiled between matrix products")


def apply(module: RewardModule) -> None:
    """Compiles the parts, at their first calls.

    The rotary embedding is a function of transformers' own module, so other models of the family in this process use
    the compiled one too, in inference mode.
    """
    for part in module.base.modules():
        if type(part).__name__.endswith(_PARTS):
            part.compile(dynamic=True)
        home = sys.modules[type(part).__module__]
        rotary = getattr(home, _ROTARY, None)
        if rotary is not None and not hasattr(rotary, "when_scoring"):
            setattr(home, _ROTARY, _compiled_when_scoring(rotary))
    module.execution = replace(module.execution, compiled=True)


def _compiled_when_scoring(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that is compiled in inference mode, and itself where gradients may be wanted."""
    compiled = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def apply(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_inference_mode_enabled() else function)(*args, **kwargs)

    apply.when_scoring = compiled  # type: ignore[attr-defined]  # a mark, so that it is not compiled twice
    return apply
