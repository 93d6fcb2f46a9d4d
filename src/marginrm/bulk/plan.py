"""An input -> shards: runs of consecutive rows, which are scored and written as a whole.

One pass over the input counts its rows, takes their digest and cuts the shards; a second one hands out the rows. So the
work is the same for every process that takes part in it, and for every run that continues it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from marginrm.bulk.rows import SourceRow, canonical, checked, read_places
from marginrm.bulk.tables import ColumnTypes, Schema
from marginrm.errors import DataError

_LARGEST = 2  # a shard may have so many times its usual rows, to end with the last row of a prompt


@dataclass(frozen=True, slots=True)
class Shard:
    """Some rows of the input.

    Attributes:
        number: Its place, from 0.
        start: Number of rows before it.
        rows: Its rows.
    """

    number: int
    start: int
    rows: list[SourceRow]


@dataclass(frozen=True, slots=True)
class Plan:
    """The shards of an input.

    Attributes:
        sizes: Number of rows of each shard.
        sha256: Digest of all rows.
        columns: Names of the input's columns.
        schema: The columns of a Parquet file; None for other formats.
    """

    sizes: tuple[int, ...]
    sha256: str
    columns: tuple[str, ...]
    schema: Schema | None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(self.sizes)


def plan_shards(
    places: Sequence[str], shard_rows: int, types: ColumnTypes | None = None, on_rows: Callable[[int], object] = int
) -> Plan:
    """Reads an input and cuts it into shards.

    A shard ends where the prompt changes, so that each prompt whose rows follow each other is computed once.

    Args:
        places: Files, folders, globs and data sets.
        shard_rows: Rows of a shard; up to twice as many if they share a prompt.
        types: Finds the columns of a Parquet file.
        on_rows: Called after each shard with its number of rows.

    Raises:
        ConfigError: A package that reads such files is not installed.
        DataError: The input cannot be read, has no rows, or none of its first rows can be scored.
    """
    digest = hashlib.sha256()
    columns: dict[str, None] = {}
    sizes = []
    for rows in _cut(checked(read_places(places), " ".join(places)), shard_rows):
        for row in rows:
            digest.update(b"unreadable" if row.fields is None else canonical(row.fields))
            digest.update(b"\n")
            columns.update(dict.fromkeys(row.fields or ()))
        if types is not None:
            types.add([row.fields or {} for row in rows])
        sizes.append(len(rows))
        on_rows(len(rows))
    if not sizes:
        raise DataError(f"{' '.join(places)}: has no rows.")
    return Plan(tuple(sizes), digest.hexdigest(), tuple(columns), types.schema() if types else None)


def read_shards(places: Sequence[str], plan: Plan, wanted: Collection[int]) -> Iterator[Shard]:
    """Reads an input again and yields the wanted shards, in order.

    Raises:
        DataError: The input has changed since it was planned, or cannot be read.
    """
    rows = read_places(places)
    start = 0
    last = max(wanted, default=-1)
    for number, size in enumerate(plan.sizes[: last + 1]):
        taken = list(islice(rows, size))
        if len(taken) < size:
            raise DataError(f"{' '.join(places)}: has fewer rows than a moment ago. Run the command again.")
        if number in wanted:
            yield Shard(number, start, taken)
        start += size


def _cut(rows: Iterator[SourceRow], shard_rows: int) -> Iterator[list[SourceRow]]:
    shard: list[SourceRow] = []
    prompt: str | None = None
    for row in rows:
        found = _prompt(row)
        same = found is not None and found == prompt and len(shard) < _LARGEST * shard_rows
        if len(shard) >= shard_rows and not same:
            yield shard
            shard = []
        shard.append(row)
        prompt = found
    if shard:
        yield shard


def _prompt(row: SourceRow) -> str | None:
    value: Any = (row.fields or {}).get("prompt")
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)
