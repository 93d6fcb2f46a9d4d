"""The C++ compiler of this machine, and the folder in which compiled code is kept from process to process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def use_cache_folder() -> Path:
    """Sets the folder in which compiled code is kept, unless `TORCHINDUCTOR_CACHE_DIR` does, and returns it."""
    folder = os.environ.setdefault(CACHE_VARIABLE, str(Path.home() / ".cache" / "marginrm" / "inductor"))
    return Path(folder)


def cpp_compiler() -> str:
    """Returns the command of the C++ compiler: `CXX`, or g++."""
    return os.environ.get("CXX", "g++")


def obstacle() -> str | None:
    """Returns why nothing can be compiled here, or None."""
    if shutil.which(cpp_compiler()) is None:
        return f"there is no C++ compiler ({cpp_compiler()})"
    try:
        use_cache_folder().mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the second without a home
        return f"the folder of compiled code cannot be made ({error}); set {CACHE_VARIABLE} to one that can be written"
    return None
