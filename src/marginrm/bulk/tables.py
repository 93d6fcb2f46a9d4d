"""Output rows -> the bytes of a shard in JSON Lines or Parquet, and shards -> one file.

The columns of a Parquet file are found before anything is scored, over all rows, so that all shards have the same ones.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import shutil
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from marginrm.atomic_file import replacing
from marginrm.errors import ConfigError, DataError
from marginrm.texts.files import needs

Format = Literal["jsonl", "jsonl.gz", "parquet"]
FORMATS: tuple[Format, ...] = ("jsonl", "jsonl.gz", "parquet")
Schema = tuple[Any, frozenset[str]]  # the pyarrow schema, and the columns that are written as text

_PART = {"reward": "float64", "tokens": "int64", "truncated": "bool", "steps": ["float64"], "familiarity": "float64"}
_ERROR = {"code": "string", "message": "string", "param": "string", "reason": "string"}
_RESULT: dict[str, Any] = {  # the fields of every kind of result; those that a row lacks are null
    "input": "string",
    "revision": "string",
    **_PART,
    "margin": "float64",
    "margin_std": "float64",
    "confidence": "float64",
    "confidence_from": "string",
    "verdict": "string",
    "chosen": _PART,
    "rejected": _PART,
    "rewards": ["float64"],
    "familiarities": ["float64"],
    "best": "int64",
    "tie": "bool",
    "mean": "float64",
    "std": "float64",
    "step_rewards": [["float64"]],  # the steps of each candidate of a group
    "errors": [{"candidate": "int64", "error": _ERROR}],
    "error": _ERROR,
}


class ColumnTypes:
    """The types of the input's columns, found row by row.

    A column whose values have several types, or a type that Parquet lacks, becomes text: JSON for what is not a text.

    Args:
        column: Name of the result's column.

    Raises:
        ConfigError: pyarrow is not installed.
    """

    def __init__(self, column: str) -> None:
        self._arrow = _pyarrow()
        self._column = column
        self._types: dict[str, Any] = {}
        self._text: set[str] = set()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Takes some rows into account."""
        arrow = self._arrow
        for name in dict.fromkeys(name for row in rows for name in row):
            if name in self._text:
                continue
            try:
                found = arrow.array([row.get(name) for row in rows]).type
                known = self._types.get(name, arrow.null())
                fields = [arrow.schema([(name, one)]) for one in (known, found)]
                self._types[name] = arrow.unify_schemas(fields, promote_options="permissive").field(0).type
            except (arrow.ArrowException, ValueError, OverflowError, UnicodeError):
                self._text.add(name)

    def schema(self) -> Schema:
        """Returns the columns of the output."""
        arrow = self._arrow
        text = {name for name, found in self._types.items() if self._unwritable(found)} | self._text
        names = dict.fromkeys((*self._types, *self._text))
        fields = [(name, arrow.string() if name in text else self._types[name]) for name in names]
        return arrow.schema([*fields, (self._column, _arrow_type(arrow, _RESULT))]), frozenset(text)

    def _unwritable(self, found: Any) -> bool:
        """Tells whether Parquet has no such type: only nulls, or an object without fields at any depth."""
        types = self._arrow.types
        if types.is_struct(found):
            return found.num_fields == 0 or any(
                self._unwritable(found.field(at).type) for at in range(found.num_fields)
            )
        if types.is_list(found):
            return self._unwritable(found.value_type)
        return bool(types.is_null(found))


def encode_rows(rows: Sequence[dict[str, Any]], form: Format, schema: Schema | None) -> bytes:
    """Returns the bytes of a shard: the same for the same rows.

    Args:
        rows: Output rows.
        form: Format of the shard.
        schema: The columns, for Parquet.

    Raises:
        DataError: A value cannot be written.
    """
    if form == "parquet":
        assert schema is not None  # planned for this format
        return _parquet(rows, schema)
    text = "".join(f"{dump(row)}\n" for row in rows).encode()
    return gzip.compress(text, compresslevel=6, mtime=0) if form == "jsonl.gz" else text


def dump(row: dict[str, Any]) -> str:
    """Returns a row as JSON; bytes become base64, dates their text, and what is not a number null.

    Raises:
        DataError: A value has another type.
    """
    try:
        return json.dumps(row, allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(_finite(row), allow_nan=False, default=_plain)


def join_shards(shards: Sequence[Path], target: Path, form: Format) -> None:
    """Writes one file of all shards, complete or not at all.

    Args:
        shards: Their files, in order.
        target: The file.
        form: Its format.
    """
    with replacing(target) as fresh:
        if form == "parquet":
            _join_parquet(shards, fresh)
        else:
            _join_bytes(shards, fresh)  # joined gzip members are a gzip file


def _join_parquet(shards: Sequence[Path], target: Path) -> None:
    _pyarrow()
    from pyarrow import parquet

    with parquet.ParquetWriter(target, parquet.read_schema(shards[0])) as writer:
        for shard in shards:
            writer.write_table(parquet.read_table(shard))


def _join_bytes(shards: Sequence[Path], target: Path) -> None:
    with target.open("wb") as file:
        for shard in shards:
            with shard.open("rb") as part:
                shutil.copyfileobj(part, file)


def _parquet(rows: Sequence[dict[str, Any]], schema: Schema) -> bytes:
    arrow = _pyarrow()
    from pyarrow import parquet

    fields, text = schema
    result = fields.names[-1]
    plain = [{**row, result: _renamed(row[result])} for row in rows]
    columns = [[_as_text(row.get(name)) if name in text else row.get(name) for row in plain] for name in fields.names]
    arrays = [arrow.array(values, type=field.type) for values, field in zip(columns, fields, strict=True)]
    sink = io.BytesIO()
    parquet.write_table(arrow.Table.from_arrays(arrays, schema=fields), sink, compression="zstd")
    return sink.getvalue()


def _renamed(result: dict[str, Any]) -> dict[str, Any]:
    """Returns a result with the steps of a group under a name of their own, since a column has one type."""
    if "rewards" in result and "steps" in result:
        result = {("step_rewards" if name == "steps" else name): value for name, value in result.items()}
    unknown = result.keys() - _RESULT.keys()
    if unknown:
        raise DataError(f"The result has the fields {sorted(unknown)}, for which the Parquet file has no column.")
    return result


def _arrow_type(arrow: Any, shape: Any) -> Any:
    if isinstance(shape, dict):
        return arrow.struct([(name, _arrow_type(arrow, one)) for name, one in shape.items()])
    if isinstance(shape, list):
        return arrow.list_(_arrow_type(arrow, shape[0]))
    return arrow.type_for_alias(shape)


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return json.dumps(value)
        return value
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime | date | time | timedelta | Decimal):
        return str(value)
    raise DataError(
        f"A value of type {type(value).__name__} cannot be written. Give --no-keep-columns, or remove its column."
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _pyarrow() -> Any:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise needs("pyarrow", "Parquet", error) from error
    return pa


def format_of(name: str) -> Format | None:
    """Returns the format of an output file by its suffix; None for a file that is continued row by row.

    Raises:
        ConfigError: The suffix is that of a format that is not written.
    """
    for form in ("jsonl.gz", "parquet"):
        if name.endswith(f".{form}"):
            return "jsonl.gz" if form == "jsonl.gz" else "parquet"
    if name.endswith((".csv", ".json", ".gz", ".tsv", ".arrow")):
        raise ConfigError(
            f"-o {name}: the output is .jsonl, .jsonl.gz or .parquet, or a folder of such files (-o OUT/)."
        )
    return None
