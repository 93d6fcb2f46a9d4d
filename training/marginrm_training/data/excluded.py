"""Rows that are excluded from a split, by reason, each with the `path:line` it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from marginrm.errors import DataError

_SHOWN = 3


@dataclass(slots=True)
class ExcludedRows:
    """Rows that are excluded.

    Attributes:
        sources: `path:line` of every row, by reason.
    """

    sources: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, source: str) -> None:
        """Adds one row."""
        self.sources.setdefault(reason, []).append(source)

    def update(self, other: ExcludedRows) -> None:
        """Adds all rows of another record."""
        for reason, sources in other.sources.items():
            self.sources.setdefault(reason, []).extend(sources)

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of rows by reason, the most frequent first."""
        return dict(
            sorted(((reason, len(sources)) for reason, sources in self.sources.items()), key=lambda item: -item[1])
        )

    @property
    def total(self) -> int:
        """Number of rows."""
        return sum(map(len, self.sources.values()))

    def __str__(self) -> str:
        """Returns every reason with its count and the first few sources."""
        return ", ".join(f"{count:,} {reason} ({self._first(reason)})" for reason, count in self.counts.items())

    def _first(self, reason: str) -> str:
        sources = self.sources[reason]
        return ", ".join(sources[:_SHOWN]) + (", ..." if len(sources) > _SHOWN else "")


@dataclass(slots=True)
class MalformedRows:
    """Counts the malformed rows of one place while it is read. It is the `on_error` of the readers.

    Attributes:
        place: The file, folder or data set.
        limit: Most malformed rows; None for any number. With 0 the first one is raised as it is.
        rows: The rows, by reason.
        first: The first row's error.
    """

    place: str
    limit: int | None = None
    rows: ExcludedRows = field(default_factory=ExcludedRows)
    first: DataError | None = None

    def __call__(self, error: DataError) -> None:
        """Counts one row.

        Raises:
            DataError: The fault is not one of a single row, or no malformed row is allowed.
        """
        if error.source is None or self.limit == 0:
            raise error
        self.first = self.first or error
        self.rows.add(error.reason, error.source)

    def check(self, usable: int) -> None:
        """Checks the counts when all rows are read.

        Args:
            usable: Number of well-formed rows.

        Raises:
            DataError: There are more malformed rows than the limit, or no others.
        """
        if self.first is None:
            return
        if not usable:
            raise DataError(f"{self.place}: none of its rows can be used: {self.rows}. The first: {self.first}")
        if self.limit is not None and self.rows.total > self.limit:
            raise DataError(
                f"{self.place}: {self.rows.total:,} malformed rows, and max_bad_rows is {self.limit:,}: {self.rows}. "
                f"Mend them, or allow more. The first: {self.first}"
            )
