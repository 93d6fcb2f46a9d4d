"""Compiles and loads the attention kernel for processors with matrix tiles (`amx.cpp`), once per machine.

It has no dependency but OpenMP's runtime, which is the one that torch has loaded, so compilation takes seconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

import torch

from marginrm import compiler
from marginrm.atomic_file import replacing

_SOURCE = Path(__file__).with_name("amx.cpp")
_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma", "amx-tile", "amx-bf16")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", *(f"-m{feature}" for feature in _FEATURES))
_CAPABILITIES = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16", "fma3", "amx_tile", "amx_bf16")
_SECONDS = 300.0  # for the compiler

Kernel = Callable[[object], int]


class KernelUnavailableError(Exception):
    """The kernel cannot be compiled or run on this machine."""


def supported() -> bool:
    """Says if this processor has all that the kernel uses."""
    has = torch.cpu.get_capabilities()
    return all(has.get(name) for name in _CAPABILITIES)


@cache
def load_kernel() -> Kernel:
    """Returns the function `attend` of the kernel, compiled in this call if it was not before.

    Raises:
        KernelUnavailableError: There is no compiler, it failed, or the operating system does not allow the tiles.
    """
    obstacle = compiler.obstacle()
    if obstacle:
        raise KernelUnavailableError(obstacle)
    try:
        library = ctypes.CDLL(str(_compiled()))
    except OSError as error:
        raise KernelUnavailableError(f"the compiled kernel cannot be loaded ({error})") from error
    library.allow_tiles.restype = library.attend.restype = ctypes.c_int64
    if library.allow_tiles():
        raise KernelUnavailableError("the operating system does not allow the tiles")
    return cast("Kernel", library.attend)


def _compiled() -> Path:
    """Returns the shared library; its name tells source and flags, so a new version gets a new one."""
    source = _SOURCE.read_bytes()
    digest = hashlib.sha256(source + " ".join(_FLAGS).encode()).hexdigest()[:16]
    target = compiler.use_cache_folder() / f"marginrm-amx-{digest}.so"
    if target.is_file():
        return target
    try:
        with replacing(target) as fresh:  # processes may compile at the same time
            command = [compiler.cpp_compiler(), *_FLAGS, str(_SOURCE), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603 - ours
            if done.returncode:
                raise KernelUnavailableError(f"the compiler failed ({' '.join(done.stderr.split())[:300]})")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailableError(f"the compiler failed ({error})") from error
    return target
