"""The device and the dtype that a model is loaded with."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from marginrm.errors import ConfigError
from marginrm.text import Dtype, check_choice
from marginrm.tuning.timing import best_seconds

_log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Returns a device; `auto` takes CUDA where there is one.

    Raises:
        ConfigError: The name is not a valid one, or this machine or this build of PyTorch lacks the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device = {name!r} is unknown. Use auto, cpu, cuda or cuda:N.") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        found = f"cpu, cuda:0 to cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
        raise ConfigError(f"device = {name!r} is not available here: {reason}. Use auto, or one of {found}.") from error
    return device


def resolve_dtype(dtype: Dtype | torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the torch dtype; `auto` is bfloat16 where a matrix product of it is measurably faster, else float32.

    Raises:
        ConfigError: The dtype is not a valid one.
    """
    name = str(dtype).removeprefix("torch.")
    check_choice(name, "dtype", Dtype)
    if name != "auto":
        return _DTYPES[name]
    kinds = torch.float32, torch.bfloat16
    seconds = dict(zip(kinds, best_seconds(*(_matmul(kind, device) for kind in kinds), times=4), strict=True))
    faster = seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]
    chosen = torch.bfloat16 if faster else torch.float32
    _log.info(
        "dtype %s: a matrix product takes %.2f ms in float32 and %.2f ms in bfloat16 on %s",
        str(chosen).removeprefix("torch."),
        seconds[torch.float32] * 1e3,
        seconds[torch.bfloat16] * 1e3,
        device,
    )
    return chosen


def _matmul(dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    left, right = (torch.ones(512, 512, dtype=dtype, device=device) for _ in range(2))
    return lambda: float((left @ right)[0, 0])  # reading the result waits for the device
