"""Compiles and loads the kernels for processors with matrix tiles (AMX), once per machine.

They have no dependency but OpenMP's runtime, which is the one that torch has loaded, so compilation takes seconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from functools import cache
from pathlib import Path

import torch

from marginrm import compiler
from marginrm.atomic_file import replacing

_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma", "amx-tile", "amx-bf16")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", *(f"-m{feature}" for feature in _FEATURES))
_CAPABILITIES = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16", "fma3", "amx_tile", "amx_bf16")
_FUNCTIONS = ("allow_tiles", "attend", "multiply")
_SECONDS = 300.0  # for the compiler


class KernelUnavailableError(Exception):
    """The kernels cannot be compiled or run on this machine."""


def supported() -> bool:
    """Says if this processor has all that the kernels use."""
    has = torch.cpu.get_capabilities()
    return all(has.get(name) for name in _CAPABILITIES)


@cache
def load_kernels() -> ctypes.CDLL:
    """Returns the library of the kernels, compiled in this call if it was not before.

    Its functions `attend` and `multiply` take the address of a structure, and return 0, or 1 without memory.

    Raises:
        KernelUnavailableError: There is no compiler, it failed, or the operating system does not allow the tiles.
    """
    obstacle = compiler.obstacle()
    if obstacle:
        raise KernelUnavailableError(obstacle)
    try:
        library = ctypes.CDLL(str(_compiled()))
    except OSError as error:
        raise KernelUnavailableError(f"the compiled kernels cannot be loaded ({error})") from error
    for name in _FUNCTIONS:
        getattr(library, name).restype = ctypes.c_int64
    if library.allow_tiles():
        raise KernelUnavailableError("the operating system does not allow the tiles")
    return library


def _compiled() -> Path:
    """Returns the shared library; its name tells sources and flags, so a new version gets a new one."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for file in (*_SOURCES, *_HEADERS):
        digest.update(file.read_bytes())
    target = compiler.use_cache_folder() / f"marginrm-amx-{digest.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    try:
        with replacing(target) as fresh:  # processes may compile at the same time
            command = [compiler.cpp_compiler(), *_FLAGS, *map(str, _SOURCES), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603 - ours
            if done.returncode:
                raise KernelUnavailableError(f"the compiler failed ({' '.join(done.stderr.split())[:300]})")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailableError(f"the compiler failed ({error})") from error
    return target
