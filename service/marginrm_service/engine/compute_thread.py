"""Threads in which torch runs."""

from __future__ import annotations

import threading
from collections.abc import Callable


class ComputeThread(threading.Thread):
    """A thread that does not keep the process from leaving, and in whose presence Python's own end may abort it.

    Coming back from torch to an interpreter that is gone, it is unwound through C++, which ends the process.

    Args:
        work: What it does.
        name: Its name, for whoever looks at the process.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(target=work, name=name, daemon=True)


def computing() -> bool:
    """Returns whether such a thread is alive."""
    return any(isinstance(thread, ComputeThread) for thread in threading.enumerate())
