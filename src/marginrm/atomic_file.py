"""Files that are written completely or not at all, and weights that other users of the machine may read."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, beside: Path | None = None) -> Iterator[Path]:
    """Gives the path of a new file, which takes the place of `path` when the block ends without an error.

    A reader, or a kill at any moment, meets the old content or the new one. The content is on disk before the name is.

    Args:
        path: The file to write.
        beside: The folder of the new file until then, on the same file system; by default that of `path`. A name in it
            is hidden and ends in `.new`, and belongs to one writer alone, on any machine.

    Raises:
        OSError: A folder cannot be written to.
    """
    fresh = (beside or path.parent) / f".{path.name}.{secrets.token_hex(6)}.new"
    try:
        yield fresh
        _flush(fresh)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def replace_file(path: Path, content: str | bytes, *, beside: Path | None = None) -> None:
    """Writes a file as `replacing` does.

    Args:
        path: The file to write.
        content: The whole content; text is written in UTF-8.
        beside: As for `replacing`.

    Raises:
        OSError: A folder cannot be written to.
    """
    with replacing(path, beside=beside) as fresh:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)


def share_weights(folder: Path) -> None:
    """Gives the weights of a checkpoint the mode of its config.json: safetensors lets only their owner read them.

    A server often runs as another user than the training, such as that of the image.

    Args:
        folder: The checkpoint; without a config.json nothing is changed.
    """
    config = folder / "config.json"
    if config.is_file():
        for path in folder.glob("*.safetensors"):
            path.chmod(config.stat().st_mode & 0o777)


def _flush(path: Path) -> None:
    """Flushes the content of a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
