"""Sources of preference pairs: a file, a folder or a Hugging Face data set. Every row keeps its `path:line`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from marginrm.errors import DataError
from marginrm.texts.json_lines import OnError
from marginrm.texts.preferences import PreferencePair
from marginrm_training.data.excluded import ExcludedRows, MalformedRows
from marginrm_training.data.files import READERS, Row, read_file, reader_of
from marginrm_training.data.formats import PARSERS, Form

_SHUFFLE_BUFFER = 10_000


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


@dataclass(frozen=True, slots=True)
class Stream:
    """A part of a data set that is read without downloading all of it.

    Attributes:
        rows: Number of rows.
        seed: Seed of their draw, from a sliding window over the stream.
    """

    rows: int
    seed: int


def read_source(
    name: str, path: str, form: Form = "pairs", stream: Stream | None = None, max_bad_rows: int | None = None
) -> Source:
    """Reads all pairs of a place, or the first ones of a stream. Malformed rows are counted by reason and left out.

    Args:
        name: The place as the configuration has it.
        path: The same with variables expanded: a `.jsonl`, `.parquet` or `.csv` file (`.gz` too), a folder of such
            files, a folder that `save_to_disk` wrote, or a data set on the Hub: `owner/name`, `owner/name:split` or
            `owner/name:subset:split`.
        form: Format of the rows.
        stream: For data sets: read this many rows as they come.
        max_bad_rows: Most malformed rows; None for any number, 0 to stop at the first.

    Raises:
        DataError: There is no such place, it cannot be read, more rows are malformed than allowed, or all are.
    """
    files = _files(Path(path))
    if files and stream:
        raise DataError(
            f"{path}: only data sets are streamed, and this is a file. Use data.limit in place of data.stream."
        )
    malformed = MalformedRows(path, max_bad_rows)
    rows = _file_rows(files, malformed) if files else _data_set_rows(path, stream)
    parse = PARSERS[form]
    pairs: list[PreferencePair] = []
    digest = hashlib.sha256()
    for row, source in rows:
        if not files:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        try:
            pairs.append(parse(row, source))
        except DataError as error:
            malformed(error)
    malformed.check(len(pairs))
    fingerprint = file_hash(files) if files else digest.hexdigest()
    return Source(name, pairs, len(pairs) + malformed.rows.total, fingerprint, malformed.rows)


def read_raw(path: str, on_error: OnError | None = None) -> Iterator[Row]:
    """Yields the rows of a place as they are, each with its `path:line`. Places and errors as for `read_source`.

    Args:
        path: The place.
        on_error: Called with the error of each row that is not an object, which is then left out. By default the first
            is raised.
    """
    files = _files(Path(path))
    return _file_rows(files, on_error) if files else _data_set_rows(path, None)


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
        found = sorted(file for file in path.rglob("*") if file.is_file() and reader_of(file) is not None)
        if not found:
            raise DataError(f"{path}: no file in this folder ends in {', '.join(READERS)} (or .gz after it).")
        # Beside data of another kind, a .json file describes them and holds no rows.
        return [file for file in found if ".json" not in file.suffixes] or found
    if path.is_file():
        return [path]
    if path.is_dir() or (_looks_like_hub(str(path)) and reader_of(path) is None):
        return []
    raise DataError(f"{path}: no such file, folder or data set. Give a path that exists, or owner/name on the Hub.")


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _looks_like_hub(path: str) -> bool:
    base = path.partition(":")[0]
    return not Path(base).is_absolute() and base.count("/") == 1 and not base.startswith((".", "~"))


def _file_rows(files: list[Path], on_error: OnError | None) -> Iterator[Row]:
    for file in files:
        yield from read_file(file, on_error)


def _data_set_rows(path: str, stream: Stream | None) -> Iterator[Row]:
    """Yields the rows of a data set, numbered from 1 as they come."""
    data = _saved(Path(path)) if _is_saved(Path(path)) else _from_hub(path, streaming=stream is not None)
    if stream is not None:
        rows = data.to_iterable_dataset() if hasattr(data, "to_iterable_dataset") else data
        data = islice(rows.shuffle(seed=stream.seed, buffer_size=_SHUFFLE_BUFFER), stream.rows)
    from datasets.exceptions import DatasetsError

    number = 0
    try:
        for number, row in enumerate(data, start=1):
            yield dict(row), f"{path}:{number}"
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path}: cannot be read after row {number:,}: {reason}") from error


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
