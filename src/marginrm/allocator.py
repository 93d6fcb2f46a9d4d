"""Settings of glibc's allocator: keep freed memory, use large pages, use one arena."""

from __future__ import annotations

import ctypes
import gc
import os
import platform

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_ARENA_MAX = -8
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
_NEVER = 2**31 - 1


def keep_memory() -> bool:
    """Lets glibc keep freed memory, so that forward passes do not request their tensors from the kernel each time.

    By default every block over 128 KiB comes from the kernel, which zeroes it page by page, and goes back when it is
    freed. That is a good part of a large model's forward pass (tests/library/test_allocator.py counts the page faults).
    One arena serves all threads, since the heaps of further arenas hold 64 MiB each and fragment. Call it before torch
    allocates. It changes the whole process, so the commands call it and the library does not.

    Returns:
        Whether the C library accepted the settings; False without glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large pages for blocks of 2 MiB and more
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_TRIM_THRESHOLD, _NEVER), (_ARENA_MAX, 1))
    return mallopt is not None and all(mallopt(*setting) for setting in settings)


def give_memory_back() -> None:
    """Returns unused memory to the kernel, such as the weights of an unloaded model.

    Models are part of reference cycles, which Python frees only now and then, so its garbage is collected first (0.2 s
    with torch in memory). Then glibc, if it is the C library, returns the memory that it keeps.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
