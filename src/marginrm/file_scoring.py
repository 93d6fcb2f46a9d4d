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
from marginrm.calibration import correctness
from marginrm.errors import ConfigError, DataError, EncodingError, MarginRMError, NonFiniteRewardError
from marginrm.json_lines import read_parsed
from marginrm.preferences import parse_group, parse_pair, parse_single
from marginrm.text import Prompt, Truncation

if TYPE_CHECKING:
    from marginrm.encoding import EncodedResponse
    from marginrm.reward_model import RewardModel

_CHUNK_RESPONSES = 256
_SHOWN = 3  # places of unusable rows, for each reason, in the summary
_CHECKED_ROWS = 100  # if none of the first rows can be scored, the file is of another format
_FORMS = '{"prompt", "response"}, {"prompt", "chosen", "rejected"}, {"prompt", "responses"} or {"prompt", "candidates"}'


@dataclass(frozen=True, slots=True)
class InputRow:
    """One input row: the responses to score, or the error that makes it unusable."""

    kind: Literal["item", "pair", "group"]
    prompt: Prompt
    responses: tuple[str, ...]
    fingerprint: str
    source: str
    id: Any = None
    error: MarginRMError | None = None

    def field(self, index: int) -> str:
        """Returns the name of a response's field in the input row."""
        return {"item": "response", "pair": ("chosen", "rejected")[index % 2], "group": f"responses[{index}]"}[
            self.kind
        ]


@dataclass(slots=True)
class Summary:
    """Counts of one run; `skipped` rows were in the output before it."""

    skipped: int = 0
    rows: int = 0
    unusable: dict[str, list[str]] = field(default_factory=dict)  # `path:line` by reason
    responses: int = 0
    tokens: int = 0
    truncated: int = 0
    pairs: int = 0
    right: float = 0.0
    margin_sum: float = 0.0

    def add_error(self, error: MarginRMError, source: str) -> None:
        """Counts an unusable row by its reason."""
        self.rows += 1
        reason = error.reason if isinstance(error, DataError) else error.code.replace("_", " ")
        self.unusable.setdefault(reason, []).append(source)

    def add_result(self, result: dict[str, Any], group: list[EncodedResponse]) -> None:
        """Counts a scored row."""
        self.rows += 1
        self.responses += len(group)
        self.tokens += sum(len(response.ids) for response in group)
        self.truncated += sum(response.truncated for response in group)
        if "verdict" in result:
            self.pairs += 1
            self.right += float(correctness(result["margin"]))
            self.margin_sum += result["margin"]

    def lines(self, seconds: float) -> list[str]:
        """Returns the summary as text."""
        failed = sum(map(len, self.unusable.values()))
        text = [
            f"{self.rows:,} rows in {seconds:.1f} s ({self.skipped:,} were done before), {failed:,} with errors",
            f"{self.responses:,} responses, {self.tokens:,} tokens, {self.responses / max(seconds, 1e-9):.1f} responses/s",
        ]
        for reason, sources in sorted(self.unusable.items(), key=lambda entry: -len(entry[1])):
            places = ", ".join(sources[:_SHOWN]) + (", ..." if len(sources) > _SHOWN else "")
            text.append(f"  {len(sources):,} {reason} ({places})")
        if self.truncated:
            text.append(f"{self.truncated:,} prompts were cut")
        if self.pairs:
            text.append(
                f"pairs: accuracy {self.right / self.pairs:.4f}, mean margin {self.margin_sum / self.pairs:.4f}"
            )
        return text


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
        if "chosen" in row or "rejected" in row:
            pair = parse_pair(row, source)
            return InputRow("pair", pair.prompt, (pair.chosen, pair.rejected), mark, source, row_id)
        if "responses" in row or "candidates" in row:
            group = parse_group(row, source)
            return InputRow("group", group.prompt, tuple(group.candidates), mark, source, row_id)
        if "response" in row:
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
    rewards = iter(model.score_encoded([group for group in encoded if not isinstance(group, MarginRMError)]))
    for given, group in zip(rows, encoded, strict=True):
        row: dict[str, Any] = {"input": given.fingerprint, "revision": model.info.revision}
        if given.id is not None:
            row["id"] = given.id
        result = group if isinstance(group, MarginRMError) else _result(given, group, next(rewards), model, tie_below)
        if isinstance(result, MarginRMError):
            row["error"] = {"code": result.code, "message": str(result)} | (
                {"param": result.param} if result.param else {}
            )
            summary.add_error(result, given.source)
        else:
            row |= result
            summary.add_result(result, [] if isinstance(group, MarginRMError) else group)
        yield row


def _encoded(model: RewardModel, given: InputRow, truncation: Truncation) -> list[EncodedResponse] | MarginRMError:
    if given.error is not None:
        return given.error
    group = []
    for index, outcome in enumerate(model.encoder.encode_group(given.prompt, given.responses, truncation)):
        if isinstance(outcome, EncodingError):
            return outcome.for_response(given.field(index))
        group.append(outcome)
    return group


def _result(
    given: InputRow, group: list[EncodedResponse], rewards: list[float], model: RewardModel, tie_below: float
) -> dict[str, Any] | NonFiniteRewardError:
    if not all(math.isfinite(reward) for reward in rewards):
        return NonFiniteRewardError("The model gave NaN or infinity.")
    parts = [
        {"reward": reward, "tokens": len(response.ids), "truncated": response.truncated}
        for reward, response in zip(rewards, group, strict=True)
    ]
    if given.kind == "item":
        return parts[0]
    if given.kind == "pair":
        result = asdict(ranking.compare(rewards[0], rewards[1], model.temperature, tie_below))
        return {**result, "chosen": parts[0], "rejected": parts[1]}
    result = asdict(ranking.rank(rewards, model.temperature, tie_below))
    del result["ranking"]
    return {"rewards": rewards, **result}


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
