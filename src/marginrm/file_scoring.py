"""Scores a file of pairs, single responses or groups, row by row, and can be stopped and continued at any row.

Each input row gives one output row, in order: what `/score` or `/best-of-n` would say of it, or its error. An output row
carries the fingerprint of its input and the model's revision, by which a continued run knows that it goes on with the
same work.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from marginrm import ranking
from marginrm.calibration import correctness
from marginrm.errors import ConfigError, DataError, EncodingError, MarginRMError, NonFiniteRewardError
from marginrm.preferences import parse_group, parse_pair, read_rows
from marginrm.text import Prompt, Truncation

if TYPE_CHECKING:
    from marginrm.encoding import EncodedResponse
    from marginrm.reward_model import RewardModel

_CHUNK_RESPONSES = 256
_FORMS = '{"prompt", "response"}, {"prompt", "chosen", "rejected"}, {"prompt", "responses"} or {"prompt", "candidates"}'


@dataclass(frozen=True, slots=True)
class Job:
    """One input row: what to score, or why that is not possible."""

    kind: Literal["item", "pair", "group"]
    prompt: Prompt
    responses: tuple[str, ...]
    fingerprint: str
    id: Any = None
    error: MarginRMError | None = None

    def field(self, index: int) -> str:
        """Returns the name of a response's field in the input row."""
        return {"item": "response", "pair": ("chosen", "rejected")[index % 2], "group": f"responses[{index}]"}[
            self.kind
        ]


@dataclass(slots=True)
class Summary:
    """What a run did. Counts are of this run alone; `skipped` rows were there already."""

    skipped: int = 0
    rows: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    responses: int = 0
    tokens: int = 0
    truncated: int = 0
    pairs: int = 0
    right: float = 0.0
    margin_sum: float = 0.0

    def lines(self, seconds: float) -> list[str]:
        """Returns the summary for people."""
        failed = sum(self.errors.values())
        text = [
            f"{self.rows:,} rows in {seconds:.1f} s ({self.skipped:,} were done before), {failed:,} with errors",
            f"{self.responses:,} responses, {self.tokens:,} tokens, {self.responses / max(seconds, 1e-9):.1f} responses/s",
        ]
        text += [f"  {count:,} x {code}" for code, count in sorted(self.errors.items())]
        if self.truncated:
            text.append(f"{self.truncated:,} prompts were cut")
        if self.pairs:
            text.append(
                f"pairs: accuracy {self.right / self.pairs:.4f}, mean margin {self.margin_sum / self.pairs:.4f}"
            )
        return text


def read_jobs(path: str | Path) -> Iterator[Job]:
    """Reads a file's rows as jobs, bad rows included.

    Raises:
        DataError: The file cannot be read.
    """
    failed: list[DataError] = []
    for row, source in read_rows(path, failed.append):
        yield from (_failed(error) for error in failed)
        failed.clear()
        yield parse_job(row, source)
    yield from (_failed(error) for error in failed)


def parse_job(row: dict[str, Any], source: str) -> Job:
    """Returns one row's job; a row of no known form gives a job that holds its error."""
    mark = fingerprint(row)
    row_id = row.get("id")
    try:
        if "chosen" in row or "rejected" in row:
            pair = parse_pair(row, source)
            return Job("pair", pair.prompt, (pair.chosen, pair.rejected), mark, row_id)
        if "responses" in row or "candidates" in row:
            group = parse_group(row, source)
            return Job("group", group.prompt, tuple(group.candidates), mark, row_id)
        if "response" in row and "prompt" in row:
            return Job("item", row["prompt"], (row["response"],), mark, row_id)
        raise DataError(f"{source}: has the fields {sorted(row)[:12]}; expected {_FORMS}.")
    except DataError as error:
        return Job("item", "", (), mark, row_id, error)


def fingerprint(row: dict[str, Any]) -> str:
    """Returns a short content hash of an input row, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:12]


def resume_point(jobs: Iterable[Job], output: Path, revision: str) -> int:
    """Returns how many rows of the output are done, after checking that they belong to this input and this model.

    A last line that was cut off while it was written is removed.

    Raises:
        ConfigError: The output is of another input or of another model.
    """
    if not output.exists():
        return 0
    done = 0
    remaining = iter(jobs)
    with output.open("r+b") as file:
        while line := file.readline():
            if not line.endswith(b"\n"):
                file.seek(-len(line), 1)
                file.truncate()
                break
            job = next(remaining, None)
            wrong = _mismatch(line, job, revision)
            if wrong:
                raise ConfigError(
                    f"{output}:{done + 1}: {wrong}, so it cannot be continued. Give another -o, or --restart to replace it."
                )
            done += 1
    return done


def score_jobs(
    model: RewardModel,
    jobs: Iterable[Job],
    truncation: Truncation,
    tie_below: float,
    summary: Summary,
) -> Iterator[dict[str, Any]]:
    """Scores jobs in chunks of about 256 responses and yields one output row for each, in order."""
    chunk: list[Job] = []
    size = 0
    for job in jobs:
        chunk.append(job)
        size += len(job.responses)
        if size >= _CHUNK_RESPONSES:
            yield from _score_chunk(model, chunk, truncation, tie_below, summary)
            chunk, size = [], 0
    if chunk:
        yield from _score_chunk(model, chunk, truncation, tie_below, summary)


def _score_chunk(
    model: RewardModel, jobs: list[Job], truncation: Truncation, tie_below: float, summary: Summary
) -> Iterator[dict[str, Any]]:
    encoded = [_encoded(model, job, truncation) for job in jobs]
    rewards = iter(model.score_encoded([group for group in encoded if not isinstance(group, MarginRMError)]))
    for job, group in zip(jobs, encoded, strict=True):
        row: dict[str, Any] = {"input": job.fingerprint, "revision": model.info.revision}
        if job.id is not None:
            row["id"] = job.id
        try:
            if isinstance(group, MarginRMError):
                raise group
            row |= _result(job, group, next(rewards), model.temperature, tie_below)
        except MarginRMError as error:
            row["error"] = {"code": error.code, "message": str(error)}
            if error.param:
                row["error"]["param"] = error.param
        _count(summary, row, [] if isinstance(group, MarginRMError) else group)
        yield row


def _encoded(model: RewardModel, job: Job, truncation: Truncation) -> list[EncodedResponse] | MarginRMError:
    if job.error is not None:
        return job.error
    group = []
    for index, outcome in enumerate(model.encoder.encode_group(job.prompt, job.responses, truncation)):
        if isinstance(outcome, EncodingError):
            return outcome.for_response(job.field(index))
        group.append(outcome)
    return group


def _result(
    job: Job, group: list[EncodedResponse], rewards: list[float], temperature: float, tie_below: float
) -> dict[str, Any]:
    if not all(math.isfinite(reward) for reward in rewards):
        raise NonFiniteRewardError("The model gave NaN or infinity.")
    parts = [
        {"reward": reward, "tokens": len(response.ids), "truncated": response.truncated}
        for reward, response in zip(rewards, group, strict=True)
    ]
    if job.kind == "item":
        return parts[0]
    if job.kind == "pair":
        result = asdict(ranking.compare(rewards[0], rewards[1], temperature, tie_below))
        return {**result, "chosen": parts[0], "rejected": parts[1]}
    result = asdict(ranking.rank(rewards, temperature, tie_below))
    del result["ranking"]
    return {"rewards": rewards, **result}


def _count(summary: Summary, row: dict[str, Any], group: list[EncodedResponse]) -> None:
    summary.rows += 1
    summary.truncated += sum(response.truncated for response in group)
    if "error" in row:
        code = row["error"]["code"]
        summary.errors[code] = summary.errors.get(code, 0) + 1
        return
    summary.responses += len(group)
    summary.tokens += sum(len(response.ids) for response in group)
    if "chosen" in row:
        summary.pairs += 1
        summary.right += float(correctness(row["margin"]))
        summary.margin_sum += row["margin"]


def _mismatch(line: bytes, job: Job | None, revision: str) -> str | None:
    try:
        row = json.loads(line)
        found = (row["input"], row["revision"])
    except (ValueError, KeyError, TypeError):
        return "is no row that `marginrm score` wrote"
    if job is None:
        return "the output has more rows than the input"
    if found[0] != job.fingerprint:
        return "belongs to another input row"
    return None if found[1] == revision else f"was scored by {found[1]}, and this model is {revision}"


def _failed(error: DataError) -> Job:
    return Job("item", "", (), "unreadable", None, error)
