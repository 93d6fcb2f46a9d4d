"""Sources of preference pairs: a file, a folder or a Hugging Face data set. Every row keeps its `path:line`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marginrm.errors import DataError
from marginrm.texts.places import Stream, data_set_rows, file_rows, files_of
from marginrm.texts.preferences import PreferencePair
from marginrm_training.data.excluded import ExcludedRows, MalformedRows
from marginrm_training.data.formats import PARSERS, Form


@dataclass(frozen=True, slots=True)
class Source:
    """The pairs of one file, folder or data set.

    Attributes:
        name: The place as the configuration has it.
        pairs: Its pairs, in order.
        rows: Number of rows, or of those that were read of a stream.
        sha256: SHA-256 of a file's bytes, of the names and hashes of a folder's files, or of a data set's rows.
        excluded: The malformed rows.
    """

    name: str
    pairs: list[PreferencePair]
    rows: int
    sha256: str
    excluded: ExcludedRows


def read_source(
    name: str,
    path: str,
    form: Form = "pairs",
    stream: Stream | None = None,
    max_bad_rows: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Source:
    """Reads all pairs of a place, or the first ones of a stream. Malformed rows are counted by reason and left out.

    Args:
        name: The place as the configuration has it.
        path: The same with variables expanded, as for `files_of`.
        form: Format of the rows.
        stream: For data sets: read this many rows as they come.
        max_bad_rows: Most malformed rows; None for any number, 0 to stop at the first.
        columns: Names of the format's fields, with the names that these rows have for them.

    Raises:
        DataError: There is no such place, it cannot be read, more rows are malformed than allowed, or all are.
    """
    files = files_of(path)
    if files and stream:
        raise DataError(
            f"{path}: only data sets are streamed, and this is a file. Use data.limit in place of data.stream."
        )
    malformed = MalformedRows(path, max_bad_rows)
    rows = file_rows(files, malformed) if files else data_set_rows(path, stream)
    parse = PARSERS[form]
    pairs: list[PreferencePair] = []
    digest = hashlib.sha256()
    for row, source in rows:
        if not files:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        try:
            pairs.append(parse(_renamed(row, columns or {}, source), source))
        except DataError as error:
            malformed(error)
    malformed.check(len(pairs))
    fingerprint = file_hash(files) if files else digest.hexdigest()
    return Source(name, pairs, len(pairs) + malformed.rows.total, fingerprint, malformed.rows)


def _renamed(row: dict[str, Any], columns: Mapping[str, str], source: str) -> dict[str, Any]:
    for name, theirs in columns.items():
        if theirs not in row:
            raise DataError.of_row(
                source,
                f"without the column {theirs}",
                f"has no column '{theirs}', which `columns` reads '{name}' from.",
            )
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return rest | {name: row[theirs] for name, theirs in columns.items()}


def file_hash(files: list[Path]) -> str:
    """Returns one file's SHA-256 as `sha256sum` gives it; for several, that of their names and hashes."""
    hashes = []
    for file in files:
        with file.open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    if len(files) == 1:
        return hashes[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(hashes, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
