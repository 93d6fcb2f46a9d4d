"""Places that hold rows: a file, a folder, a glob or a Hugging Face data set. Every row keeps its `path:line`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from marginrm.errors import DataError
from marginrm.texts.files import READERS, Row, needs, read_file, reader_of
from marginrm.texts.json_lines import OnError, count_lines, read_rows

_SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True, slots=True)
class Stream:
    """A part of a data set that is read without downloading all of it.

    Attributes:
        rows: Number of rows.
        seed: Seed of their draw, from a sliding window over the stream.
    """

    rows: int
    seed: int


def read_raw(place: str, on_error: OnError | None = None) -> Iterator[Row]:
    """Yields the rows of a place as they are, each with its `path:line`. Places and errors as for `files_of`.

    Args:
        place: The place.
        on_error: Called with the error of each row that is not an object, which is then left out. By default the first
            is raised.
    """
    files = files_of(place)
    return file_rows(files, on_error) if files else data_set_rows(place, None)


def files_of(place: str) -> list[Path]:
    """Returns the files to read; none if the place is a data set.

    Args:
        place: A `.jsonl`, `.json`, `.parquet` or `.csv` file (`.gz` too; another suffix is read as JSON Lines), a folder
            of such files, a glob of files and folders, a folder that `save_to_disk` wrote, or a data set on the Hub:
            `owner/name`, `owner/name:split` or `owner/name:subset:split`.

    Raises:
        DataError: There is no such place, or no file of rows in the folder.
    """
    path = Path(place)
    if path.is_dir():
        return [] if _is_saved(path) else _files_in(path)
    if path.exists():  # a pipe too
        return [path]
    found = sorted(glob(place, recursive=True)) if has_magic(place) else []  # noqa: PTH207 - Path.glob refuses absolute patterns
    if found:
        return [file for one in found for file in (_files_in(Path(one)) if Path(one).is_dir() else [Path(one)])]
    if _looks_like_hub(place) and reader_of(path) is None and not has_magic(place):
        return []
    raise DataError(f"{place}: no such file, folder or data set. Give a path that exists, or owner/name on the Hub.")


def count_rows(places: Iterable[str]) -> int | None:
    """Returns the number of rows of places, unreadable ones included; None if one can be read only once, as a pipe."""
    total = 0
    for place in places:
        files = files_of(place)
        if not all(file.is_file() for file in files):
            return None
        lines = [file for file in files if reader_of(file) in (None, read_rows)]
        total += sum(map(count_lines, lines))
        others = [file for file in files if file not in lines]
        failed: list[DataError] = []
        rows = file_rows(others, failed.append) if files else data_set_rows(place, None)
        total += sum(1 for _ in rows) + len(failed)
    return total


def _files_in(folder: Path) -> list[Path]:
    """Returns the files of rows in a folder and below it, in order of their names; hidden ones hold no rows."""
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and reader_of(file) is not None
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not found:
        raise DataError(f"{folder}: no file in this folder ends in {', '.join(READERS)} (or .gz after it).")
    # Beside data of another kind, a .json file describes them and holds no rows.
    return [file for file in found if ".json" not in file.suffixes] or found


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _looks_like_hub(path: str) -> bool:
    base = path.partition(":")[0]
    return not Path(base).is_absolute() and base.count("/") == 1 and not base.startswith((".", "~"))


def file_rows(files: Sequence[Path], on_error: OnError | None) -> Iterator[Row]:
    """Yields the rows of files, one file after the other. `on_error` as for `read_raw`."""
    for file in files:
        yield from read_file(file, on_error)


def data_set_rows(path: str, stream: Stream | None) -> Iterator[Row]:
    """Yields the rows of a data set, numbered from 1 as they come.

    Args:
        path: A folder that `save_to_disk` wrote, or a name on the Hub.
        stream: Read a part only, without downloading all.

    Raises:
        ConfigError: The package `datasets` is not installed.
        DataError: The data set cannot be loaded or read.
    """
    try:
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise needs("datasets", f"{path}: a data set", error) from error
    data = _saved(Path(path)) if _is_saved(Path(path)) else _from_hub(path, streaming=stream is not None)
    if stream is not None:
        rows = data.to_iterable_dataset() if hasattr(data, "to_iterable_dataset") else data
        data = islice(rows.shuffle(seed=stream.seed, buffer_size=_SHUFFLE_BUFFER), stream.rows)
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
