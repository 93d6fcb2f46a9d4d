"""Files that are written completely or not at all."""

from __future__ import annotations

from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file, UTF-8 for text, so that a reader or a kill at any moment meets the old content or the new one.

    Raises:
        OSError: The folder cannot be written to.
    """
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    fresh.replace(path)
