"""The C++ compiler of this machine, and the folder in which compiled code is kept from process to process."""

from __future__ import annotations

import getpass
import os
import shutil
from pathlib import Path
from tempfile import gettempdir

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def use_cache_folder() -> Path:
    """Sets the folder in which compiled code is kept, unless `TORCHINDUCTOR_CACHE_DIR` does, and returns it.

    torch sets that variable itself, when a part of its compiler is imported: to `torchinductor_<user>` among the temporary
    files. These may be gone at the next start, so that very folder counts as not set.
    """
    given = os.environ.get(CACHE_VARIABLE)
    folder = Path(given) if given else None
    if folder is None or folder == Path(gettempdir(), f"torchinductor_{_user()}"):
        folder = Path.home() / ".cache" / "marginrm" / "inductor"
        os.environ[CACHE_VARIABLE] = str(folder)
    return folder


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return ""


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
