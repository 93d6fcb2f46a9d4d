"""Rows that are excluded from a split, by reason, each with the `path:line` it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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

    def __str__(self) -> str:
        """Returns every reason with its count and the first few sources."""
        return ", ".join(f"{count:,} {reason} ({self._first(reason)})" for reason, count in self.counts.items())

    def _first(self, reason: str) -> str:
        sources = self.sources[reason]
        return ", ".join(sources[:_SHOWN]) + (", ..." if len(sources) > _SHOWN else "")
