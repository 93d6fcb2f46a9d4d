"""The progress of long work: a bar on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import io
import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

_EVERY = 30.0  # seconds between two lines


def progress_bar(
    description: str, total: int | None, unit: str, *, initial: int = 0, disable: bool = False
) -> tqdm[Any]:
    """Returns tqdm's bar on standard error. Without a terminal, each of its states is a line, at most every 30 seconds.

    Args:
        description: The work.
        total: Number of units; None if it is not known.
        unit: One of them, in the singular.
        initial: Units of an earlier run, which are not part of the rate.
        disable: Whether to show nothing.
    """
    options: dict[str, Any] = {"total": total, "initial": initial, "desc": description, "unit": unit}
    if sys.stderr.isatty():
        return tqdm(**options, disable=disable)
    return tqdm(
        **options, disable=disable, file=_Lines(), mininterval=_EVERY, maxinterval=_EVERY, miniters=1, ncols=100
    )


class Progress:
    """Counts rows, with their rate and the time that is left.

    Args:
        description: The work.
        total: Number of rows; None if it is not known.
        done: Rows of an earlier run, which are not part of the rate.
    """

    def __init__(self, description: str, total: int | None = None, done: int = 0) -> None:
        self.rows = 0
        self._started = time.monotonic()
        self._bar = progress_bar(description, total, " rows", initial=done)

    def update(self, rows: int) -> None:
        """Adds rows of this run."""
        self.rows += rows
        self._bar.update(rows)

    @property
    def rate(self) -> float:
        """Rows per second of this run."""
        return self.rows / max(time.monotonic() - self._started, 1e-9)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()


class _Lines(io.StringIO):
    """Writes each state of a bar as a line of its own on standard error."""

    def write(self, text: str) -> int:
        state = text.strip("\r\n ")
        if state:
            sys.stderr.write(state + "\n")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()
