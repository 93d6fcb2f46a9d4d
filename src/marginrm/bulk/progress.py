"""The progress of a run: a bar on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

_EVERY = 30.0  # seconds between two lines


class Progress:
    """Counts rows, with their rate and the time that is left.

    Args:
        description: The work.
        total: Number of rows; None if it is not known.
        done: Rows of an earlier run, which are not part of the rate.
    """

    def __init__(self, description: str, total: int | None = None, done: int = 0) -> None:
        self._description = description
        self._total = total
        self._done = self._first = done
        self._started = self._told = time.monotonic()
        quiet = not sys.stderr.isatty()
        self._bar = None if quiet else tqdm(total=total, initial=done, desc=description, unit=" rows")

    def update(self, rows: int) -> None:
        """Adds rows."""
        self._done += rows
        if self._bar is not None:
            self._bar.update(rows)
        elif time.monotonic() - self._told >= _EVERY:
            self._told = time.monotonic()
            sys.stderr.write(f"{self._description}: {self.line()}\n")
            sys.stderr.flush()

    @property
    def rows(self) -> int:
        """Rows of this run."""
        return self._done - self._first

    @property
    def rate(self) -> float:
        """Rows per second of this run."""
        return self.rows / max(time.monotonic() - self._started, 1e-9)

    def line(self) -> str:
        """Returns rows, rate and the time that is left, in words."""
        text = f"{self._done:,} rows, {self.rate:,.1f} rows/s"
        if self._total is None:
            return text
        left = (self._total - self._done) / self.rate if self.rate else 0.0
        minutes, seconds = divmod(round(left), 60)
        return f"{self._done:,} of {self._total:,} rows, {self.rate:,.1f} rows/s, {minutes} min {seconds} s left"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
