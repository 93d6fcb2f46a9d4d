"""Scores a file of pairs, single responses or groups row by row; a stopped run can be continued at any row.

Each input row gives one output row, in order: the result that `/score` or `/best-of-n` would give, or its error. An
output row carries the fingerprint of its input row and the model's revision, so that a continued run can check that it
does the same work.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from marginrm import ranking
from marginrm.errors import ConfigError, DataError, EncodingError, MarginRMError, NonFiniteRewardError
from marginrm.file_summary import Summary
from marginrm.process_rewards import steps_of
from marginrm.text import Prompt, Truncation
from marginrm.texts.json_lines import read_parsed
from marginrm.texts.preferences import parse_group, parse_pair, parse_single
from marginrm.texts.published import is_pair

if TYPE_CHECKING:
    from marginrm.encoding import EncodedResponse
    from marginrm.reward_model import RewardModel

_CHUNK_RESPONSES = 256
_CHECKED_ROWS = 100  # if none of the first rows can be scored, the file is of another format
_FORMS = '{"prompt", "response"}, {"prompt", "chosen", "rejected"}, {"prompt", "responses"} or {"prompt", "candidates"}'


@dataclass(frozen=True, slots=True)
class InputRow:
    """One input row: the responses to score, or the error that makes it unusable; `faults` are those of responses."""

    kind: Literal["item", "pair", "group"]
    prompt: Prompt
    responses: tuple[str, ...]
    fingerprint: str
    source: str
    id: Any = None
    error: MarginRMError | None = None
    faults: dict[int, EncodingError] = field(default_factory=dict, compare=False)

    def field_of(self, index: int) -> str:
        """Returns the name of a response's field in the input row."""
        return {"item": "response", "pair": ("chosen", "rejected")[index % 2], "group": f"responses[{index}]"}[
            self.kind
        ]


class InputFile(Iterator[InputRow]):
    """The rows of an input file, unusable ones included. The file is read and parsed once, as rows are taken.

    Args:
        path: A file of one JSON object a line, compressed with gzip or not.

    Attributes:
        size: Bytes of the file.
        position: Bytes that have been read.

    Raises:
        DataError: The file cannot be read, or none of its first rows can be scored, so that it is of another format.
    """

    def __init__(self, path: Path) -> None:
        self.position = 0
        rows = self._read(path)
        first = list(islice(rows, _CHECKED_ROWS))
        if first and all(given.error for given in first):
            raise DataError(
                f"{path}: none of its first {len(first)} lines can be scored. The first: {first[0].error} "
                f"The file must be JSON Lines: one object a line, {_FORMS}."
            )
        self.size = path.stat().st_size
        self._rows = chain(first, rows)

    def __next__(self) -> InputRow:
        """Returns the next row."""
        return next(self._rows)

    def _read(self, path: Path) -> Iterator[InputRow]:
        failed: list[DataError] = []
        for given in read_parsed(path, parse_row, failed.append, self._moved):
            yield from _unreadable(failed)
            yield given
        yield from _unreadable(failed)

    def _moved(self, position: int) -> None:
        self.position = position


def parse_row(row: dict[str, Any], source: str) -> InputRow:
    """Returns one row of a file; a row in an unknown form holds its error."""
    mark = fingerprint(row)
    row_id = row.get("id")
    try:
        if is_pair(row):
            pair = parse_pair(row, source)
            return InputRow("pair", pair.prompt, (pair.chosen, pair.rejected), mark, source, row_id)
        if row.keys() & {"responses", "candidates", "answers", "completions"}:
            group = parse_group(row, source)
            return InputRow("group", group.prompt, tuple(group.candidates), mark, source, row_id)
        if row.keys() & {"response", "completion"}:
            prompt, response = parse_single(row, source)
            return InputRow("item", prompt, (response,), mark, source, row_id)
        raise DataError.of_row(source, "with other fields", f"has the fields {sorted(row)[:12]}; expected {_FORMS}.")
    except DataError as error:
        return InputRow("item", "", (), mark, source, row_id, error)


def fingerprint(row: dict[str, Any]) -> str:
    """Returns a short content hash of an input row, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:12]


def resume(rows: Iterator[InputRow], output: Path) -> tuple[int, str | None]:
    """Takes the rows that an earlier run has scored, after checking that its output belongs to this input.

    A last line that was cut off while it was written is removed.

    Returns:
        The number of rows that are done, and the revision of the model that scored them (None without rows).

    Raises:
        ConfigError: The output belongs to another input, or to two models.
    """
    done, revision = 0, None
    if not output.exists():
        return done, revision
    with output.open("r+b") as file:
        while line := file.readline():
            if not line.endswith(b"\n"):
                file.seek(-len(line), 1)
                file.truncate()
                break
            revision = _checked_revision(line, next(rows, None), revision, f"{output}:{done + 1}")
            done += 1
    return done, revision


def check_revision(output: Path, found: str | None, revision: str) -> None:
    """Checks that an output was scored by the model that is to continue it.

    Raises:
        ConfigError: The output was scored by another model.
    """
    if found not in (None, revision):
        raise _another(f"{output}: was scored by {found}, and this model is {revision}")


def score_rows(
    model: RewardModel,
    rows: Iterable[InputRow],
    truncation: Truncation,
    tie_below: float,
    summary: Summary,
) -> Iterator[dict[str, Any]]:
    """Scores rows in chunks of about 256 responses and yields one output row for each, in order."""
    chunk: list[InputRow] = []
    size = 0
    for given in rows:
        chunk.append(given)
        size += len(given.responses)
        if size >= _CHUNK_RESPONSES:
            yield from _score_chunk(model, chunk, truncation, tie_below, summary)
            chunk, size = [], 0
    if chunk:
        yield from _score_chunk(model, chunk, truncation, tie_below, summary)


def _score_chunk(
    model: RewardModel, rows: list[InputRow], truncation: Truncation, tie_below: float, summary: Summary
) -> Iterator[dict[str, Any]]:
    encoded = [_encoded(model, given, truncation) for given in rows]
    usable = [list(group.values()) for group in encoded if not isinstance(group, MarginRMError)]
    rewards = iter(model.score_encoded(usable))
    for given, group in zip(rows, encoded, strict=True):
        row: dict[str, Any] = {"input": given.fingerprint, "revision": model.info.revision}
        if given.id is not None:
            row["id"] = given.id
        result = group if isinstance(group, MarginRMError) else _result(given, group, next(rewards), model, tie_below)
        if isinstance(result, MarginRMError):
            row["error"] = _error_body(result)
            summary.add_error(result, given.source)
        else:
            row |= result
            summary.add_result(result, [] if isinstance(group, MarginRMError) else list(group.values()))
            for index, error in given.faults.items():
                summary.add_candidate_error(error, given.source, index)
        yield row


def _encoded(model: RewardModel, given: InputRow, truncation: Truncation) -> dict[int, EncodedResponse] | MarginRMError:
    """Returns the encoded responses by index; of a group those that can be read, if any can, and notes the others."""
    if given.error is not None:
        return given.error
    group: dict[int, EncodedResponse] = {}
    for index, outcome in enumerate(model.encoder.encode_group(given.prompt, given.responses, truncation)):
        if isinstance(outcome, EncodingError):
            given.faults[index] = outcome.for_response(given.field_of(index))
        else:
            group[index] = outcome
    if given.faults and (given.kind != "group" or not group):
        return next(iter(given.faults.values()))
    return group


def _result(
    given: InputRow, group: dict[int, EncodedResponse], rewards: list[float], model: RewardModel, tie_below: float
) -> dict[str, Any] | NonFiniteRewardError:
    if not all(math.isfinite(reward) for reward in rewards):
        return NonFiniteRewardError("The model gave NaN or infinity.")
    steps = [steps_of(reward) for reward in rewards]
    parts = [
        {"reward": reward, "tokens": len(response.ids), "truncated": response.truncated}
        | ({} if found is None else {"steps": list(found)})
        for reward, response, found in zip(rewards, group.values(), steps, strict=True)
    ]
    if given.kind == "item":
        return parts[0]
    if given.kind == "pair":
        result = asdict(ranking.compare(rewards[0], rewards[1], model.temperature, tie_below))
        return {**result, "chosen": parts[0], "rejected": parts[1]}
    positions = list(group)
    ranked = asdict(ranking.rank(rewards, model.temperature, tie_below))
    del ranked["ranking"]
    known = dict(zip(positions, rewards, strict=True))
    result = {"rewards": [known.get(index) for index in range(len(given.responses))], **ranked}
    result["best"] = positions[ranked["best"]]
    if any(steps):
        found_steps = dict(zip(positions, steps, strict=True))
        result["steps"] = [found_steps.get(index) for index in range(len(given.responses))]
    errors = [{"candidate": index, "error": _error_body(error)} for index, error in given.faults.items()]
    return result | ({"errors": errors} if errors else {})


def _error_body(error: MarginRMError) -> dict[str, str]:
    return {"code": error.code, "message": str(error)} | ({"param": error.param} if error.param else {})


def _checked_revision(line: bytes, given: InputRow | None, revision: str | None, source: str) -> str:
    try:
        row = json.loads(line)
        mark, found = str(row["input"]), str(row["revision"])
    except (ValueError, KeyError, TypeError):
        raise _another(f"{source}: is not a row that `marginrm score` wrote") from None
    if given is None:
        raise _another(f"{source}: the output has more rows than the input")
    if mark != given.fingerprint:
        raise _another(f"{source}: belongs to another input row")
    if revision not in (None, found):
        raise _another(f"{source}: was scored by {found}, and the rows before it by {revision}")
    return found


def _another(fault: str) -> ConfigError:
    return ConfigError(f"{fault}, so the output cannot be continued. Give another -o, or --restart to replace it.")


def _unreadable(failed: list[DataError]) -> Iterator[InputRow]:
    for error in failed:
        yield InputRow("item", "", (), "unreadable", error.source or "", None, error)
    failed.clear()
