"""The mark of tests that need the kernels for matrix tiles (AMX)."""

from __future__ import annotations

import shutil

import pytest

from marginrm.amx.kernels import supported
from marginrm.compiler import cpp_compiler

needs_tiles = pytest.mark.skipif(
    shutil.which(cpp_compiler()) is None or not supported(),
    reason="needs a processor with matrix tiles (AMX), and a C++ compiler",
)
