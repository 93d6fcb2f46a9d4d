"""One JSON Lines file as the output, written row by row: a stopped run continues after its last whole row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from marginrm.bulk.rows import InputRow
from marginrm.bulk.summary import Summary
from marginrm.bulk.tables import dump
from marginrm.errors import ConfigError


def resume(
    rows: Iterator[InputRow], output: Path, column: str | None, summary: Summary
) -> tuple[str | None, Iterator[InputRow]]:
    """Takes the rows that an earlier run has scored, after checking that its output belongs to this input.

    A last line that was cut off while it was written is removed.

    Args:
        rows: The rows of the input.
        output: The file.
        column: The column that holds the results; None if they are the rows.
        summary: Gets the number of rows that are done, and those of them with errors by reason.

    Returns:
        The revision of the model that scored them, None without rows; and the rows that are left.

    Raises:
        ConfigError: The output belongs to another input, or to two models.
    """
    revision: str | None = None
    if not output.exists():
        return revision, rows
    with output.open("r+b") as file:
        while line := file.readline():
            given = next(rows, None)
            source = f"{output}:{summary.rows + 1}"
            if not line.endswith(b"\n"):
                if given is None or not _begins(line, given, column):
                    raise _another(f"{source}: its last line is not the beginning of this input row's result")
                file.seek(-len(line), 1)
                file.truncate()
                rows = chain([given], rows)
                break
            row = _checked(line, given, column, source)
            if revision not in (None, row["revision"]):
                raise _another(f"{source}: was scored by {row['revision']}, and the rows before it by {revision}")
            revision = row["revision"]
            _count(row, given, summary)
    return revision, rows


def check_revision(output: Path, found: str | None, revision: str) -> None:
    """Checks that an output was scored by the model that is to continue it.

    Raises:
        ConfigError: The output was scored by another model.
    """
    if found not in (None, revision):
        raise _another(f"{output}: was scored by {found}, and this model is {revision}")


def _begins(line: bytes, given: InputRow, column: str | None) -> bool:
    """Tells whether a line that was cut off may be the result of a row: it is the beginning of it, or the other way round."""
    start = {"input": given.fingerprint} if column is None else given.given.fields or {}
    wanted = dump(start).removesuffix("}").encode()
    return line.startswith(wanted) or wanted.startswith(line)


def _count(row: dict[str, Any], given: InputRow | None, summary: Summary) -> None:
    if "error" not in row:
        summary.rows += 1
        return
    error = row["error"]
    summary.add_failed(error.get("reason", error["code"].replace("_", " ")), given.source if given else "")


def _checked(line: bytes, given: InputRow | None, column: str | None, source: str) -> dict[str, Any]:
    """Returns the result in a line."""
    try:
        row = json.loads(line)
        result: dict[str, Any] = row if column is None else row[column]
        mark, _ = str(result["input"]), str(result["revision"])
    except (ValueError, KeyError, TypeError):
        columns = "without" if column is None else "with"
        raise _another(f"{source}: is not a row that `marginrm score` wrote {columns} the input's columns") from None
    if given is None:
        raise _another(f"{source}: the output has more rows than the input")
    if mark != given.fingerprint:
        raise _another(f"{source}: belongs to another input row")
    return result


def _another(fault: str) -> ConfigError:
    return ConfigError(f"{fault}, so the output cannot be continued. Give another -o, or --restart to replace it.")
