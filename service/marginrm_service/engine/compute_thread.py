"""Threads that run torch."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

_log = logging.getLogger(__name__)
T = TypeVar("T")


class ComputeThread(threading.Thread):
    """A daemon thread that runs torch.

    If the interpreter shuts down while such a thread is inside torch, its return unwinds C++ frames and aborts the
    process. `server.run` therefore exits with `os._exit` when one is alive.

    Args:
        work: The function that it runs.
        name: Name of the thread, as debuggers and `/proc` show it.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(target=work, name=name, daemon=True)


def is_computing() -> bool:
    """Returns whether a compute thread is alive."""
    return any(isinstance(thread, ComputeThread) for thread in threading.enumerate())


async def in_compute_thread(function: Callable[[], T], name: str) -> T:
    """Runs a function in a compute thread and returns its result, or raises its exception."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def resolve(set_outcome: Callable[..., None], outcome: object) -> None:
        if not future.done():
            set_outcome(outcome)

    def run() -> None:
        try:
            resolved: tuple[Callable[..., None], object] = future.set_result, function()
        except BaseException as error:  # noqa: BLE001 - handed to the awaiting task
            resolved = future.set_exception, error
        try:
            loop.call_soon_threadsafe(resolve, *resolved)
        except RuntimeError:
            _log.debug("The event loop was closed before %s had ended", name)

    ComputeThread(run, name).start()
    return await future
