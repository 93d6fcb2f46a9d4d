"""Rows that were left out, by reason, each with the place it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_SHOWN = 3


@dataclass(slots=True)
class Drops:
    """What was left out.

    Attributes:
        places: `path:line` of every row, by reason.
    """

    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Notes one row."""
        self.places.setdefault(reason, []).append(place)

    def update(self, other: Drops) -> None:
        """Takes over all rows of another list."""
        for reason, places in other.places.items():
            self.places.setdefault(reason, []).extend(places)

    @property
    def counts(self) -> Mapping[str, int]:
        """How many rows, by reason, the most frequent first."""
        return dict(
            sorted(((reason, len(places)) for reason, places in self.places.items()), key=lambda item: -item[1])
        )

    def __str__(self) -> str:
        """Returns every reason with its count and the first few places."""
        return ", ".join(f"{count:,} {reason} ({self._first(reason)})" for reason, count in self.counts.items())

    def _first(self, reason: str) -> str:
        places = self.places[reason]
        return ", ".join(places[:_SHOWN]) + (", ..." if len(places) > _SHOWN else "")
