"""Files of rows in JSON Lines, JSON, CSV and Parquet. Every row keeps its `path:line`; a malformed one is reported."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from marginrm.errors import ConfigError, DataError
from marginrm.texts.json_lines import OnError, json_kind, read_rows

Row = tuple[dict[str, Any], str]
Reader = Callable[[Path, OnError | None], Iterator[Row]]

_TEXT_NUMBERS = ("margin", "strength")  # columns that a CSV file can only give as text
_BATCH = 1024


def reader_of(file: Path) -> Reader | None:
    """Returns the reader of a file by its suffix, before `.gz` if it has that; None for other files."""
    return READERS.get(Path(file.name.removesuffix(".gz")).suffix)


def read_file(file: Path, on_error: OnError | None = None) -> Iterator[Row]:
    """Yields the rows of a file, as JSON Lines if its suffix is not known.

    Args:
        file: The file.
        on_error: Called with the error of each row that cannot be read, which is then left out. By default the first is
            raised.

    Raises:
        DataError: The file cannot be read, or a row cannot.
    """
    return (reader_of(file) or read_rows)(file, on_error)


def _csv_rows(file: Path, on_error: OnError | None) -> Iterator[Row]:
    """Yields the rows of a CSV file with a header; an empty cell is a missing value."""
    opener: Callable[..., TextIO] = gzip.open if file.suffix == ".gz" else open
    csv.field_size_limit(1 << 30)  # a response may well be longer than the default of 128 KiB
    line = 1
    try:
        with opener(file, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            reader = csv.reader(text, strict=True)
            header = next(reader, [])
            while True:
                line = reader.line_num + 1
                source = f"{file}:{line}"
                try:
                    cells = next(reader)
                    if cells:
                        yield _csv_row(header, cells, source), source
                except StopIteration:
                    return
                except (csv.Error, DataError) as error:
                    _report(_csv_error(error, source), on_error)
    except (OSError, EOFError, csv.Error) as error:
        raise DataError(f"{file}:{line}: cannot be read as CSV: {error}") from error


def _csv_row(header: list[str], cells: list[str], source: str) -> dict[str, Any]:
    if len(cells) != len(header):
        raise DataError.of_row(
            source, "not valid CSV", "has another number of cells than the header. Are commas quoted?"
        )
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise DataError.of_row(source, "not valid UTF-8", "is not valid UTF-8.") from None
    return {name: _cell(name, value, source) for name, value in zip(header, cells, strict=True) if value != ""}


def _csv_error(error: csv.Error | DataError, source: str) -> DataError:
    """Returns the error of one row; a quote that is never closed is an error of the file, because it hides all rows after."""
    if isinstance(error, DataError):
        return error
    if "unexpected end of data" in str(error):
        return DataError(f"{source}: cannot be read as CSV: a quote that opens in this row is never closed.")
    return DataError.of_row(source, "not valid CSV", f"cannot be read as CSV: {error}.")


def _cell(name: str, value: str, source: str) -> str | float:
    if name in _TEXT_NUMBERS:
        try:
            return float(value)
        except ValueError:
            raise DataError.of_row(source, "with an invalid number", f"field '{name}' must be a number.") from None
    return value


def needs(package: str, purpose: str, error: ImportError) -> ConfigError:
    """Returns the error of a package that is not installed, with the extra that installs it.

    Args:
        package: Its name.
        purpose: The work that needs it, as the beginning of a sentence.
        error: The error of its import.
    """
    return ConfigError(f'{purpose} needs {package} ({error}). Run: pip install "marginrm[data]"')


def _parquet_rows(file: Path, _: OnError | None) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise needs("pyarrow", f"{file}: Parquet", error) from error

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{file}:{number}"
    except (OSError, ArrowException) as error:
        raise DataError(f"{file}: cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from error


def _json_rows(file: Path, on_error: OnError | None) -> Iterator[Row]:
    """Yields the objects of a JSON file: one list of them, numbered from 1, or one object a line, as for `read_rows`."""
    opener: Callable[..., TextIO] = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig") as text:
            if _is_object(text.readline()):
                yield from read_rows(file, on_error)
                return
            text.seek(0)
            rows = json.load(text)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: cannot be read as JSON in UTF-8: {error} (One object a line? Name it .jsonl.)"
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{file}: a .json file must be one list of objects, or one object a line.")
    for number, row in enumerate(rows, start=1):
        source = f"{file}:{number}"
        if isinstance(row, dict):
            yield row, source
        else:
            detail = f"must be a JSON object, not {json_kind(row)}."
            _report(DataError.of_row(source, "not a JSON object", detail), on_error)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _report(error: DataError, on_error: OnError | None) -> None:
    if on_error is None or error.source is None:
        raise error
    on_error(error)


READERS: dict[str, Reader] = {
    ".jsonl": read_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
}
