"""Preference pairs and candidate groups from `.jsonl` and `.jsonl.gz` files; every fault has a `path:line` and a reason.

Pairs:

- `{"prompt", "chosen", "rejected"}` (TRL, RewardBench): texts, messages, or dialogues that repeat the prompt;
- `{"chosen", "rejected"}` alone, each a whole dialogue (HH-RLHF's text, or messages): split at the last assistant turn.

Both may have other published names of fields (`marginrm.texts.published`). Either may carry `margin` (a target margin) or `strength` (the label's probability); other fields are kept in `extra`.

Groups, for Best-of-N:

- `{"prompt", "responses": [text, ...], "rewards"?: [number, ...]}` (RLHFlow);
- `{"prompt", "candidates": [text | {"text", "win_prob" | "gold" | "quality"?}, ...]}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marginrm.errors import DataError
from marginrm.text import Prompt
from marginrm.texts.dialogue import Field, prompt_of, read_prompt, read_response, same_prompt
from marginrm.texts.json_lines import OnError, json_kind, read_parsed
from marginrm.texts.published import as_group, as_pair, with_prompt

_GOLD_FIELDS = ("win_prob", "gold", "quality")
_PAIR_FORMS = '{"prompt", "chosen", "rejected"}, or two whole dialogues as {"chosen", "rejected"}'
_GROUP_FORMS = '{"prompt", "responses", "rewards"?} or {"prompt", "candidates"}'
_LARGEST = 10**300  # integers above do not fit a float


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two responses to one prompt, the first of which was preferred.

    Attributes:
        prompt: One user message, or messages that end before the response.
        chosen: The preferred response.
        rejected: The other one.
        margin: The row's target margin, if it has one.
        strength: Probability that the label is right, in [0, 1], if the row has one.
        source: `path:line`.
        extra: The row's other fields.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    strength: float | None = None
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CandidateGroup:
    """One prompt and its candidates.

    Attributes:
        prompt: One user message, or messages that end before the response.
        candidates: The responses.
        gold: A judge's value of each candidate, if the row has them.
        source: `path:line`.
        extra: The row's other fields.
    """

    prompt: Prompt
    candidates: list[str]
    gold: list[float] | None = None
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def read_pairs(path: str | Path, on_error: OnError | None = None) -> Iterator[PreferencePair]:
    """Reads preference pairs one by one.

    Args:
        path: A `.jsonl` file, compressed with gzip or not, whatever its name.
        on_error: Called with the error of each unusable row, which is then left out. By default the first is raised.

    Raises:
        DataError: The file cannot be read, or a row is unusable.
    """
    return read_parsed(path, parse_pair, on_error)


def read_groups(path: str | Path, on_error: OnError | None = None) -> Iterator[CandidateGroup]:
    """Reads candidate groups one by one. Arguments and errors are those of `read_pairs`."""
    return read_parsed(path, parse_group, on_error)


def parse_pair(row: Mapping[str, Any], source: str) -> PreferencePair:
    """Returns a row's preference pair.

    Args:
        row: The decoded JSON object.
        source: `path:line`, for errors.

    Raises:
        DataError: The row has no known form, no preference, or a field of another type, or its responses answer different
            prompts.
    """
    row = as_pair(row, source)
    if "chosen" not in row or "rejected" not in row:
        raise _no_pair(row, source)
    sides = [Field(source, name) for name in ("chosen", "rejected")]
    given = read_prompt(row.get("prompt"), Field(source, "prompt"))
    responses = [read_response(row[side.name], side) for side in sides]
    prompt, other = (prompt_of(given, response, side) for response, side in zip(responses, sides, strict=True))
    if not same_prompt(prompt, other):
        raise DataError.of_row(
            source,
            "answers to different prompts",
            "fields 'chosen' and 'rejected' are dialogues that differ before their last assistant turn, so they answer "
            "different prompts.",
        )
    return PreferencePair(
        prompt=prompt,
        chosen=responses[0].text,
        rejected=responses[1].text,
        margin=_number(row.get("margin"), Field(source, "margin")),
        strength=_number(row.get("strength"), Field(source, "strength"), low=0.0, high=1.0),
        source=source,
        extra=_others(row, "prompt", "chosen", "rejected", "margin", "strength"),
    )


def parse_single(row: Mapping[str, Any], source: str) -> tuple[Prompt, str]:
    """Returns prompt and response of a row `{"prompt", "response" | "completion"}`. Arguments and errors as for `parse_pair`."""
    name = "response" if "response" in row else "completion"
    field, row = Field(source, name), with_prompt(row, source, name)
    given = read_prompt(row.get("prompt"), Field(source, "prompt"))
    response = read_response(row.get(name), field)
    return prompt_of(given, response, field), response.text


def parse_group(row: Mapping[str, Any], source: str) -> CandidateGroup:
    """Returns a row's candidate group. Arguments and errors are those of `parse_pair`."""
    row = as_group(row, source)
    name = "candidates" if "candidates" in row else "responses"
    if name not in row or row.get("prompt") is None:
        raise _other_fields(row, source, _GROUP_FORMS)
    raw, field = row[name], Field(source, name)
    if not isinstance(raw, list) or not raw:
        raise field.error("without candidates", f"must be a list of at least one response, not {json_kind(raw)}.")
    given = read_prompt(row["prompt"], Field(source, "prompt"))
    responses = [read_response(_candidate(one), field.at(index)) for index, one in enumerate(raw)]
    prompts = [prompt_of(given, response, field.at(index)) for index, response in enumerate(responses)]
    if not all(same_prompt(prompts[0], other) for other in prompts[1:]):
        raise field.error("answers to different prompts", "holds dialogues that differ before their last turn.")
    return CandidateGroup(
        prompt=prompts[0],
        candidates=[response.text for response in responses],
        gold=_gold(row, raw, field),
        source=source,
        extra=_others(row, "prompt", name, *(["rewards"] if name == "responses" else [])),
    )


def _candidate(value: Any) -> Any:
    return value["text"] if isinstance(value, dict) and "text" in value else value


def _gold(row: Mapping[str, Any], raw: list[Any], field: Field) -> list[float] | None:
    """Returns each candidate's gold value, from `rewards` beside `responses` or from the candidates themselves."""
    if field.name == "responses":
        rewards = row.get("rewards")
        beside = Field(field.source, "rewards")
        if rewards is not None and (not isinstance(rewards, list) or len(rewards) != len(raw)):
            raise beside.error("with uneven gold values", f"must be a list of {len(raw)} numbers, one per response.")
        values = [_number(value, beside.at(index)) for index, value in enumerate(rewards or [])]
    else:
        values = [_gold_of(candidate, field.at(index)) for index, candidate in enumerate(raw)]
    known = [value for value in values if value is not None]
    if known and len(known) < len(raw):
        raise field.error(
            "with uneven gold values", f"has a gold value for only {len(known)} of {len(raw)} candidates. All or none."
        )
    return known or None


def _gold_of(candidate: Any, field: Field) -> float | None:
    if not isinstance(candidate, dict):
        return None
    key = next((key for key in _GOLD_FIELDS if candidate.get(key) is not None), None)
    return None if key is None else _number(candidate[key], field.at(key))


def _number(value: Any, field: Field, *, low: float = -math.inf, high: float = math.inf) -> float | None:
    reason = "with an invalid number"
    if value is None:
        return None
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise field.error(reason, "is too large.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise field.error(reason, f"must be a finite number, not {json_kind(value)}.")
    if not low <= value <= high:
        raise field.error(reason, f"is {value:g}; it must be {low:g} to {high:g}.")
    return float(value)


def _others(row: Mapping[str, Any], *known: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in known}


def _no_pair(row: Mapping[str, Any], source: str) -> DataError:
    if row.keys() & {"responses", "candidates", "answers", "completions"}:
        detail = (
            "has a list of responses; a pair has the preferred one and another. Rows like this are candidate groups."
        )
        return DataError.of_row(source, "with a list of responses", detail)
    if row.keys() & {"response", "completion"} and not row.keys() & {"chosen", "rejected"}:
        return DataError.of_row(source, "with one response", "has one response and no other to compare it with.")
    return _other_fields(row, source, _PAIR_FORMS)


def _other_fields(row: Mapping[str, Any], source: str, forms: str) -> DataError:
    found = ", ".join(repr(str(key)[:40]) for key in list(row)[:12]) or "none"
    return DataError.of_row(source, "with other fields", f"has the fields {found}; expected {forms}.")
