"""Sources of preference pairs: a file, a folder or a Hugging Face data set. Every row keeps its `path:line`."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from marginrm.errors import DataError
from marginrm.json_lines import read_rows
from marginrm.preferences import PreferencePair
from marginrm_training.data.excluded import ExcludedRows
from marginrm_training.data.formats import PARSERS, Form, UnusableRowError

Row = tuple[dict[str, Any], str]

_TEXT_NUMBERS = ("margin", "strength")  # columns that a CSV file can only give as text
_BATCH = 1024
_SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True, slots=True)
class Source:
    """The pairs of one file, folder or data set.

    Attributes:
        name: The place as the configuration has it.
        pairs: Its pairs, in order.
        rows: Number of rows, or of those that were read of a stream.
        sha256: SHA-256 of a file's bytes, of the names and hashes of a folder's files, or of a data set's rows.
        excluded: Rows that are known not to be usable pairs.
    """

    name: str
    pairs: list[PreferencePair]
    rows: int
    sha256: str
    excluded: ExcludedRows


@dataclass(frozen=True, slots=True)
class Stream:
    """A part of a data set that is read without downloading all of it.

    Attributes:
        rows: Number of rows.
        seed: Seed of their draw, from a sliding window over the stream.
    """

    rows: int
    seed: int


def read_source(name: str, path: str, form: Form = "pairs", stream: Stream | None = None) -> Source:
    """Reads all pairs of a place, or the first ones of a stream.

    Args:
        name: The place as the configuration has it.
        path: The same with variables expanded: a `.jsonl`, `.parquet` or `.csv` file (`.gz` too), a folder of such
            files, a folder that `save_to_disk` wrote, or a data set on the Hub: `owner/name`, `owner/name:split` or
            `owner/name:subset:split`.
        form: Format of the rows.
        stream: For data sets: read this many rows as they come.

    Raises:
        DataError: There is no such place, it cannot be read, or a row is malformed.
    """
    files = _files(Path(path))
    if files and stream:
        raise DataError(
            f"{path}: only data sets are streamed, and this is a file. Use data.limit in place of data.stream."
        )
    rows = _file_rows(files) if files else _data_set_rows(path, stream)
    parse = PARSERS[form]
    pairs: list[PreferencePair] = []
    excluded = ExcludedRows()
    count, digest = 0, hashlib.sha256()
    for row, source in rows:
        count += 1
        if not files:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        try:
            pairs.append(parse(row, source))
        except UnusableRowError as error:
            excluded.add(error.reason, source)
    fingerprint = file_hash(files) if files else digest.hexdigest()
    return Source(name, pairs, count, fingerprint, excluded)


def read_raw(path: str) -> Iterator[Row]:
    """Yields the rows of a place as they are, each with its `path:line`. Places and errors as for `read_source`."""
    files = _files(Path(path))
    return _file_rows(files) if files else _data_set_rows(path, None)


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


def _files(path: Path) -> list[Path]:
    """Returns the files to read; none if the path is a data set: on the Hub, or a folder that `datasets` saved."""
    if path.is_dir() and not _is_saved(path):
        found = sorted(file for file in path.rglob("*") if file.is_file() and _reader(file) is not None)
        if not found:
            raise DataError(f"{path}: no file in this folder ends in {', '.join(_READERS)} (or .gz after it).")
        # Beside data of another kind, a .json file describes them and holds no rows.
        return [file for file in found if ".json" not in file.suffixes] or found
    if path.is_file():
        return [path]
    if path.is_dir() or (_looks_like_hub(str(path)) and _reader(path) is None):
        return []
    raise DataError(f"{path}: no such file, folder or data set. Give a path that exists, or owner/name on the Hub.")


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _looks_like_hub(path: str) -> bool:
    base = path.partition(":")[0]
    return not Path(base).is_absolute() and base.count("/") == 1 and not base.startswith((".", "~"))


def _file_rows(files: list[Path]) -> Iterator[Row]:
    for file in files:
        yield from (_reader(file) or read_rows)(file)


def _reader(file: Path) -> Callable[[Path], Iterator[Row]] | None:
    return _READERS.get(Path(file.name.removesuffix(".gz")).suffix)


def _csv_rows(file: Path) -> Iterator[Row]:
    """Yields the rows of a CSV file with a header; an empty cell is a missing value."""
    opener: Callable[..., TextIO] = gzip.open if file.suffix == ".gz" else open
    csv.field_size_limit(1 << 30)  # a response may well be longer than the default of 128 KiB
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            line = 2
            for row in reader:
                source = f"{file}:{line}"
                if None in row or None in row.values():
                    raise DataError(f"{source}: has another number of cells than the header. Are commas quoted?")
                yield {name: _cell(name, value, source) for name, value in row.items() if value != ""}, source
                line = reader.line_num + 1
    except (OSError, UnicodeDecodeError, EOFError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as CSV in UTF-8: {error}") from error


def _cell(name: str, value: str, source: str) -> str | float:
    if name not in _TEXT_NUMBERS:
        return value
    try:
        return float(value)
    except ValueError:
        raise DataError(f"{source}: field '{name}' must be a number.") from None


def _parquet_rows(file: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{file}:{number}"
    except (OSError, ArrowException) as error:
        raise DataError(f"{file}: cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from error


def _json_rows(file: Path) -> Iterator[Row]:
    """Yields the objects of a JSON file that is one list of them, numbered from 1."""
    opener: Callable[..., TextIO] = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig") as text:
            rows = json.load(text)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: cannot be read as JSON in UTF-8: {error} (One object a line? Name it .jsonl.)"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: a .json file must be one list of objects; for one object a line, name it .jsonl.")
    for number, row in enumerate(rows, start=1):
        yield row, f"{file}:{number}"


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
}


def _data_set_rows(path: str, stream: Stream | None) -> Iterator[Row]:
    """Yields the rows of a data set, numbered from 1 as they come."""
    data = _saved(Path(path)) if _is_saved(Path(path)) else _from_hub(path, streaming=stream is not None)
    if stream is not None:
        rows = data.to_iterable_dataset() if hasattr(data, "to_iterable_dataset") else data
        data = islice(rows.shuffle(seed=stream.seed, buffer_size=_SHUFFLE_BUFFER), stream.rows)
    for number, row in enumerate(data, start=1):
        yield dict(row), f"{path}:{number}"


def _saved(folder: Path) -> Any:
    from datasets.dataset_dict import DatasetDict
    from datasets.load import load_from_disk

    try:
        data = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read as a saved data set: {error}") from error
    if isinstance(data, DatasetDict):
        splits = [str(split) for split in data]
        raise DataError(f"{folder} holds the splits {', '.join(splits)}. Give one of them: {folder / splits[0]}")
    return data


def _from_hub(name: str, *, streaming: bool) -> Any:
    from datasets.exceptions import DatasetsError
    from datasets.load import load_dataset

    repository, *rest = name.split(":")
    split = rest[-1] if rest else "train"
    subset = rest[0] if len(rest) > 1 else None
    load: Callable[..., Any] = load_dataset
    try:
        return load(repository, subset, split=split, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{name}: no such file or folder, and as a data set on the Hub it cannot be loaded: {reason} Write it as "
            "owner/name, owner/name:split or owner/name:subset:split."
        ) from error
