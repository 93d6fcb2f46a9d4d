"""JSON Lines files -> objects, each with its `path:line`."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from marginrm.errors import DataError

OnError = Callable[[DataError], object]

_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_Row = TypeVar("_Row")


def read_parsed(
    path: str | Path,
    parse: Callable[[dict[str, Any], str], _Row],
    on_error: OnError | None = None,
) -> Iterator[_Row]:
    """Reads the rows of a file one by one.

    Args:
        path: A file of one JSON object a line, compressed with gzip or not, whatever its name.
        parse: Makes a row of an object and its `path:line`; raises DataError for an unusable one.
        on_error: Called with the error of each unusable row, which is then left out. By default the first is raised.

    Raises:
        DataError: The file cannot be read, or a row is unusable.
    """
    for number, line in _lines(Path(path)):
        source = f"{path}:{number}"
        try:
            row = parse(_object(line, source), source)
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        yield row


def read_rows(path: str | Path, on_error: OnError | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """Reads a file's JSON objects, each with its `path:line`. Arguments and errors are those of `read_parsed`."""
    return read_parsed(path, lambda row, source: (row, source), on_error)


def count_lines(path: Path) -> int:
    """Returns the number of lines of a file that are not blank.

    Raises:
        DataError: The file cannot be read.
    """
    return sum(1 for _ in _lines(path))


def json_kind(value: Any) -> str:
    """Names the JSON type of a value. The value itself may be private and is not repeated."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str | list) and not value:
        return "an empty text" if isinstance(value, str) else "an empty list"
    names = {type(None): "null", bool: "a boolean", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that are not blank, each with its number from 1."""
    try:
        with path.open("rb") as file:
            lines = gzip.GzipFile(fileobj=file) if file.peek(2).startswith(_GZIP_MAGIC) else file
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if text.strip():
                    yield number, text
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _object(line: bytes, source: str) -> dict[str, Any]:
    def broken(detail: str) -> DataError:
        return DataError.of_row(source, "not valid JSON", detail)

    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise broken(f"is not valid UTF-8 (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise broken(f"is not valid JSON: {error.msg} (column {error.colno}).") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise broken("has a number that is too long to read.") from error
    except RecursionError as error:
        raise broken("cannot be read as JSON: too many nested brackets.") from error
    if not isinstance(row, dict):
        raise DataError.of_row(source, "not a JSON object", f"must be a JSON object, not {json_kind(row)}.")
    return row
