"""Input rows -> output rows: the result that `/score` or `/best-of-n` would give for each, or its error, in order.

An output row carries the fingerprint of its input row and the model's revision, so that a continued run can check that
it does the same work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from marginrm import ranking
from marginrm.bulk.summary import Summary, reason_of
from marginrm.confidence.uncertain_reward import familiarity_of
from marginrm.errors import ConfigError, EncodingError, MarginRMError, NonFiniteRewardError
from marginrm.process_rewards import steps_of
from marginrm.reading import ReadingOptions
from marginrm.text import Dtype, Truncation

if TYPE_CHECKING:
    from marginrm.bulk.rows import InputRow
    from marginrm.encoding import EncodedResponse
    from marginrm.reward_model import RewardModel

_CHUNK_RESPONSES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How a model is loaded. Attributes as for `RewardModel.from_pretrained`."""

    model: str
    dtype: Dtype = "auto"
    device: str = "auto"
    max_length: int | None = None
    token_budget: int | None = None
    tensor_parallel: int = 1
    compiled: bool = False
    prefix_cache_mib: float = 0
    reading: ReadingOptions

    def load(self) -> RewardModel:
        """Loads the model and checks its golden samples.

        Raises:
            ModelError: It cannot be loaded, or does not give its golden rewards.
        """
        from marginrm.reward_model import RewardModel

        loaded = RewardModel.from_pretrained(
            self.model,
            dtype=self.dtype,
            device=self.device,
            max_length=self.max_length,
            token_budget=self.token_budget,
            reading=self.reading,
            tensor_parallel=self.tensor_parallel,
            compiled=self.compiled,
            prefix_cache_mib=self.prefix_cache_mib,
        )
        loaded.verify_golden()
        return loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptions:
    """How rows are scored and written.

    Attributes:
        truncation: What happens to sequences over the limit.
        tie_below: Confidence below which a comparison is a tie.
        column: Keep the input's columns, with the result in a column of this name; None for the result alone.
    """

    truncation: Truncation = "error"
    tie_below: float = 0.5
    column: str | None = None

    def check_columns(self, columns: Iterable[str]) -> None:
        """Checks that the result's column is not one of the input's.

        Raises:
            ConfigError: It is.
        """
        if self.column is not None and self.column in columns:
            raise ConfigError(f"The input has a column {self.column!r} already. Give another --score-column.")


def score_rows(
    model: RewardModel, rows: Iterable[InputRow], options: RowOptions, summary: Summary
) -> Iterator[dict[str, Any]]:
    """Scores rows in chunks of about 256 responses and yields one output row for each, in order."""
    chunk: list[InputRow] = []
    size = 0
    for given in rows:
        chunk.append(given)
        size += len(given.responses)
        if size >= _CHUNK_RESPONSES:
            yield from score_chunk(model, chunk, options, summary)
            chunk, size = [], 0
    if chunk:
        yield from score_chunk(model, chunk, options, summary)


def score_chunk(
    model: RewardModel, rows: Sequence[InputRow], options: RowOptions, summary: Summary
) -> Iterator[dict[str, Any]]:
    """Scores rows together and yields one output row for each, in order.

    Args:
        model: The model.
        rows: The rows; those that share a prompt are computed together.
        options: How they are scored.
        summary: Gets the counts.

    Raises:
        DataError: More rows cannot be scored than the summary allows. The rows before have been yielded.
    """
    encoded = [_encoded(model, given, options.truncation) for given in rows]
    rewards = iter(_rewards(model, rows, encoded))
    for given, group in zip(rows, encoded, strict=True):
        row: dict[str, Any] = {"input": given.fingerprint, "revision": model.info.revision}
        if given.id is not None and options.column is None:
            row["id"] = given.id
        result = (
            group
            if isinstance(group, MarginRMError)
            else _result(given, group, next(rewards), model, options.tie_below)
        )
        if isinstance(result, MarginRMError):
            row["error"] = _error_body(result) | {"reason": reason_of(result)}
            summary.add_error(result, given.source)
        else:
            row |= result
            summary.add_result(result, [] if isinstance(group, MarginRMError) else list(group.values()))
            for index, error in given.faults.items():
                summary.add_candidate_error(error, given.source, index)
        yield row if options.column is None else {**(given.given.fields or {}), options.column: row}


def _rewards(
    model: RewardModel, rows: Sequence[InputRow], encoded: Sequence[dict[int, EncodedResponse] | MarginRMError]
) -> list[list[float]]:
    """Returns the rewards of the usable rows. Rows of one prompt are one group, so that it is computed once."""
    usable: list[list[EncodedResponse]] = []
    by_prompt: dict[str, list[int]] = {}
    for given, group in zip(rows, encoded, strict=True):
        if isinstance(group, MarginRMError):
            continue
        key = given.prompt if isinstance(given.prompt, str) else json.dumps(given.prompt, default=str)
        by_prompt.setdefault(key, []).append(len(usable))
        usable.append(list(group.values()))
    together = [[response for index in indices for response in usable[index]] for indices in by_prompt.values()]
    rewards: list[list[float]] = [[] for _ in usable]
    for indices, found in zip(by_prompt.values(), model.score_encoded(together), strict=True):
        values = iter(found)
        for index in indices:
            rewards[index] = [next(values) for _ in usable[index]]
    return rewards


def _encoded(model: RewardModel, given: InputRow, truncation: Truncation) -> dict[int, EncodedResponse] | MarginRMError:
    """Returns the encoded responses by index; of a group those that can be read, if any can, and notes the others."""
    if given.error is not None:
        return given.error
    responses = given.responses if model.steps else [_as_text(response) for response in given.responses]
    group: dict[int, EncodedResponse] = {}
    for index, outcome in enumerate(model.encoder.encode_group(given.prompt, responses, truncation)):
        if isinstance(outcome, EncodingError):
            given.faults[index] = outcome.for_response(given.field_of(index))
        else:
            group[index] = outcome
    if given.faults and (given.kind != "group" or not group):
        return next(iter(given.faults.values()))
    return group


def _as_text(response: Any) -> Any:
    """Returns a list of one text as that text: published data writes a response so, and it is not a list of steps."""
    return response[0] if not isinstance(response, str) and len(response) == 1 else response


def _result(
    given: InputRow, group: dict[int, EncodedResponse], rewards: list[float], model: RewardModel, tie_below: float
) -> dict[str, Any] | NonFiniteRewardError:
    if not all(math.isfinite(reward) for reward in rewards):
        return NonFiniteRewardError("The model gave NaN or infinity.")
    steps = [steps_of(reward) for reward in rewards]
    parts = [
        {"reward": reward, "tokens": response.tokens, "truncated": response.truncated}
        | ({} if found is None else {"steps": list(found)})
        | ({} if (familiarity := familiarity_of(reward)) is None else {"familiarity": familiarity})
        for reward, response, found in zip(rewards, group.values(), steps, strict=True)
    ]
    if given.kind == "item":
        return parts[0]
    if given.kind == "pair":
        compared = ranking.compare(rewards[0], rewards[1], model.temperature, tie_below)
        return {**_known(asdict(compared)), "chosen": parts[0], "rejected": parts[1]}
    positions = list(group)
    ranked = _known(asdict(ranking.rank(rewards, model.temperature, tie_below, groups=model.info.groups)))
    del ranked["ranking"]
    known = dict(zip(positions, rewards, strict=True))
    result = {"rewards": [known.get(index) for index in range(len(given.responses))], **ranked}
    result["best"] = positions[ranked["best"]]
    if any(steps):
        found_steps = dict(zip(positions, steps, strict=True))
        result["steps"] = [found_steps.get(index) for index in range(len(given.responses))]
    if any("familiarity" in part for part in parts):
        familiar = {position: part["familiarity"] for position, part in zip(positions, parts, strict=True)}
        result["familiarities"] = [familiar.get(index) for index in range(len(given.responses))]
    errors = [{"candidate": index, "error": _error_body(error)} for index, error in given.faults.items()]
    return result | ({"errors": errors} if errors else {})


def _known(result: dict[str, Any]) -> dict[str, Any]:
    """Returns a comparison or a ranking without the uncertainty that the model does not tell."""
    return {name: value for name, value in result.items() if name != "margin_std" or value is not None}


def _error_body(error: MarginRMError) -> dict[str, str]:
    return {"code": error.code, "message": str(error)} | ({"param": error.param} if error.param else {})
