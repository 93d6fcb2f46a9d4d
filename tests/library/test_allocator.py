"""The C library keeps freed memory once it is asked to."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import sys
import resource
from marginrm.allocator import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(4_000_000).add(1)
before = faults()
for _ in range(20):
    torch.ones(4_000_000).add(1)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_blocks_are_not_fetched_anew_from_the_kernel() -> None:
    fresh, kept = (
        int(subprocess.run([sys.executable, "-c", _PROGRAM, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("default", "keep")
    )

    assert kept < fresh / 10


_FREED = """
from marginrm.allocator import give_memory_back, keep_memory
assert keep_memory()
import psutil
import torch
blocks = [torch.ones(2_000_000) for _ in range(20)]
del blocks
kept = psutil.Process().memory_info().rss
give_memory_back()
print(kept - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_kept_memory_is_returned_on_request() -> None:
    done = subprocess.run([sys.executable, "-c", _FREED], capture_output=True, text=True, check=True)

    assert int(done.stdout) > 100 * 2**20  # of 160 MB


_SWAPPED = """
import ctypes
import gc
from support.models import decoder_tokenizer
from marginrm.encoding import Encoder
from marginrm.allocator import keep_memory
assert keep_memory()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c d e f used free g".split()]
library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
words = [" ".join(f"{letter}{number}word" for number in range(start, start + 50))
         for letter in "abcd" for start in range(0, 2000, 50)]
def model():
    encoder = Encoder(decoder_tokenizer(), max_length=10_000, architecture="decoder")
    encoder.encode_group("Which words?", words)
    gc.collect()
for _ in range(2):
    model()
before = library.mallinfo2().used
for _ in range(10):
    model()
print(library.mallinfo2().used - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc from 2.33 on counts")
def test_models_that_come_and_go_leave_no_words_behind() -> None:
    folder = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": folder, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", _SWAPPED], capture_output=True, text=True, check=True, env=environment)

    assert int(done.stdout) < 2**20  # with a tokenizer of its own, each would leave about as much
