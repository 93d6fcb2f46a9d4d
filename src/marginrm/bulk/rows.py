"""Rows of an input: as they are read, and as groups of responses that can be scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal

from marginrm.errors import DataError, EncodingError, MarginRMError
from marginrm.text import Prompt, Response
from marginrm.texts.places import read_raw
from marginrm.texts.preferences import parse_group, parse_pair, parse_single
from marginrm.texts.published import is_pair

_CHECKED_ROWS = 100  # if none of the first rows can be scored, the input is of another format
_GROUP_FIELDS = ("responses", "candidates", "answers", "completions")
_FORMS = '{"prompt", "response"}, {"prompt", "chosen", "rejected"}, {"prompt", "responses"} or {"prompt", "candidates"}'


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it was read.

    Attributes:
        fields: The row's columns; None if it cannot be read.
        source: `path:line`.
        error: The reason why it cannot be read.
    """

    fields: dict[str, Any] | None
    source: str
    error: DataError | None = None


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row with the responses to score, or the error that makes it unusable; `faults` are those of responses."""

    kind: Literal["item", "pair", "group"]
    prompt: Prompt
    responses: tuple[Response, ...]
    fingerprint: str
    given: SourceRow
    error: MarginRMError | None = None
    faults: dict[int, EncodingError] = field(default_factory=dict, compare=False)

    @property
    def source(self) -> str:
        """The row's `path:line`."""
        return self.given.source

    @property
    def id(self) -> Any:
        """The row's own name, if it has one."""
        return self.given.fields.get("id") if self.given.fields else None

    def field_of(self, index: int) -> str:
        """Returns the name of a response's field in the input row."""
        return {"item": "response", "pair": ("chosen", "rejected")[index % 2], "group": f"responses[{index}]"}[
            self.kind
        ]


def read_places(places: Sequence[str]) -> Iterator[SourceRow]:
    """Yields the rows of places in order, unreadable ones included. They are read once, as rows are taken.

    Args:
        places: Files, folders, globs and data sets, as for `marginrm.texts.places.files_of`.

    Raises:
        ConfigError: A package that reads such files is not installed.
        DataError: A place cannot be read.
    """
    failed: list[DataError] = []
    for place in places:
        for fields, source in read_raw(place, failed.append):
            yield from _unreadable(failed)
            yield SourceRow(fields, source)
        yield from _unreadable(failed)


def checked(rows: Iterable[SourceRow], place: str) -> Iterator[SourceRow]:
    """Returns all rows, after a look at the first ones.

    Args:
        rows: The rows of an input.
        place: Its name, for errors.

    Raises:
        DataError: None of the first rows can be scored, so the input is of another format.
    """
    rest = iter(rows)
    first = list(islice(rest, _CHECKED_ROWS))
    errors = [parse_row(given).error for given in first]
    if first and all(errors):
        raise DataError(
            f"{place}: none of its first {len(first)} rows can be scored. The first: {errors[0]} The rows must have one "
            f"of these forms: {_FORMS}. A file of one JSON object a line is named .jsonl."
        )
    return chain(first, rest)


def parse_row(given: SourceRow) -> InputRow:
    """Returns the responses of a row; a row in an unknown form holds its error.

    A list of texts in place of a response is its steps, for a process reward model.
    """
    if given.fields is None:
        return InputRow("item", "", (), "unreadable", given, given.error)
    mark, source = fingerprint(given.fields), given.source
    if _is_stepwise(given.fields):
        row = {name: value for name, value in given.fields.items() if name not in ("completions", "labels")}
        row["response"] = given.fields["completions"]
    else:
        row = given.fields
    steps: dict[str, tuple[str, ...]] = {}
    row = {
        name: value if name == "prompt" else _joined(value, steps, whole=name in _GROUP_FIELDS)
        for name, value in row.items()
    }
    try:
        if is_pair(row):
            pair = parse_pair(row, source)
            responses = [pair.chosen, pair.rejected]
            return InputRow("pair", pair.prompt, _with_steps(responses, steps), mark, given)
        if row.keys() & set(_GROUP_FIELDS):
            group = parse_group(row, source)
            return InputRow("group", group.prompt, _with_steps(group.candidates, steps), mark, given)
        if row.keys() & {"response", "completion"}:
            prompt, response = parse_single(row, source)
            return InputRow("item", prompt, _with_steps([response], steps), mark, given)
        raise DataError.of_row(source, "with other fields", f"has the fields {sorted(row)[:12]}; expected {_FORMS}.")
    except DataError as error:
        return InputRow("item", "", (), mark, given, error)


def fingerprint(row: dict[str, Any]) -> str:
    """Returns a short content hash of an input row, whatever the order of its fields."""
    return hashlib.sha256(canonical(row)).hexdigest()[:12]


def canonical(row: dict[str, Any]) -> bytes:
    """Returns a row as JSON with its fields in order; values that JSON lacks are written as Python prints them."""
    return json.dumps(row, sort_keys=True, default=str).encode()


def _unreadable(failed: list[DataError]) -> Iterator[SourceRow]:
    for error in failed:
        yield SourceRow(None, error.source or "", error)
    failed.clear()


def _is_stepwise(row: dict[str, Any]) -> bool:
    """Tells TRL's rows for process reward models, `{"prompt", "completions": steps, "labels"}`, from candidates."""
    steps, labels = row.get("completions"), row.get("labels")
    return _is_steps(steps) and isinstance(labels, list) and len(labels) == len(row["completions"])


def _is_steps(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(step, str) for step in value)


def _joined(value: Any, steps: dict[str, tuple[str, ...]], *, whole: bool) -> Any:
    """Returns a field with each list of steps as one text, which the parser of rows takes, and notes the steps."""
    if whole and isinstance(value, list):
        return [_joined(one, steps, whole=False) for one in value]
    if isinstance(value, dict) and _is_steps(value.get("text")):
        return {**value, "text": _joined(value["text"], steps, whole=False)}
    if not _is_steps(value):
        return value
    text = "\n\n".join(value)
    steps[text] = tuple(value)
    return text


def _with_steps(responses: Sequence[str], steps: dict[str, tuple[str, ...]]) -> tuple[Response, ...]:
    return tuple(steps.get(response, response) for response in responses)
