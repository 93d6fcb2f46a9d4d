"""Recorded traffic -> rows to score: rows of files as for `marginrm score`, and bodies of requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from marginrm.bulk.rows import InputRow, SourceRow, checked, parse_row, read_places

_LISTS = ("pairs", "items", "prompts")  # of the bodies of /score and /best-of-n


def read_traffic(places: Sequence[str]) -> Iterator[InputRow]:
    """Returns the rows of recorded traffic in order; a row that cannot be read holds its error.

    Args:
        places: Files, folders, globs and data sets, as for `marginrm.texts.places.files_of`. A row may also be the body of
            a request to `/score` or `/best-of-n`, which counts as its pairs, items and prompts.

    Raises:
        ConfigError: A package that reads such files is not installed.
        DataError: A place cannot be read, or none of the first rows can be scored.
    """
    given = (part for row in read_places(places) for part in _of_request(row))
    return map(parse_row, checked(given, places[0]))


def _of_request(given: SourceRow) -> Iterator[SourceRow]:
    """Yields the parts of a request's body; any other row as it is."""
    lists = {name: given.fields[name] for name in _LISTS if given.fields and _is_list(given.fields.get(name))}
    if not lists:
        yield given
    for name, parts in lists.items():
        for index, part in enumerate(parts):
            yield SourceRow(part, f"{given.source} {name}[{index}]")


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)
