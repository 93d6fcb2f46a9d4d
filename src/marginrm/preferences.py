"""Preference pairs and candidate groups from `.jsonl` and `.jsonl.gz` files; every fault is a `path:line`.

Pairs:

- `{"prompt", "chosen", "rejected"}` (TRL, RewardBench): texts, or lists of `{"role", "content"}` messages;
- `{"chosen", "rejected"}` alone, each a whole dialogue (HH-RLHF's text, or messages): split at the last assistant turn.

Either may carry `margin` (a target margin) or `strength` (the label's probability); other fields are kept in `extra`.

Groups, for Best-of-N:

- `{"prompt", "responses": [text, ...], "rewards"?: [number, ...]}` (RLHFlow);
- `{"prompt", "candidates": [text | {"text", "win_prob" | "gold" | "quality"?}, ...]}`.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from marginrm.errors import DataError
from marginrm.text import Message, Prompt

OnError = Callable[[DataError], None]

_GZIP_MAGIC = b"\x1f\x8b"
_HH_TURN = "\n\nAssistant:"
_GOLD_FIELDS = ("win_prob", "gold", "quality")
_PAIR_FORMS = '{"prompt", "chosen", "rejected"}, or two whole dialogues as {"chosen", "rejected"}'
_GROUP_FORMS = '{"prompt", "responses", "rewards"?} or {"prompt", "candidates"}'
_LARGEST = 10**300  # integers above do not fit a float
_Row = TypeVar("_Row")


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
        gold: What a judge gave each candidate, if the row says so.
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
        on_error: Called with the error of each bad row, which is then left out. By default the first one is raised.

    Raises:
        DataError: The file cannot be read, or a row is unusable.
    """
    return _read(path, parse_pair, on_error)


def read_groups(path: str | Path, on_error: OnError | None = None) -> Iterator[CandidateGroup]:
    """Reads candidate groups one by one. Arguments and errors as for `read_pairs`."""
    return _read(path, parse_group, on_error)


def read_rows(path: str | Path, on_error: OnError | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """Reads a file's JSON objects, each with its `path:line`. Arguments and errors as for `read_pairs`."""
    return _read(path, lambda row, source: (row, source), on_error)


def parse_pair(row: Mapping[str, Any], source: str) -> PreferencePair:
    """Returns a row's preference pair.

    Args:
        row: The decoded JSON object.
        source: `path:line`, for errors.

    Raises:
        DataError: The row has neither form, or a field of another type.
    """
    if "chosen" not in row or "rejected" not in row:
        raise _neither(row, source, _PAIR_FORMS)
    if row.get("prompt") is not None:
        prompt = _prompt(row["prompt"], source, "prompt")
        chosen, rejected = (_response(row[name], prompt, source, name) for name in ("chosen", "rejected"))
    else:
        prompt, chosen = _split(row["chosen"], source, "chosen")
        other, rejected = _split(row["rejected"], source, "rejected")
        if prompt != other:
            raise DataError(
                f"{source}: fields 'chosen' and 'rejected' are dialogues that differ before their last assistant turn, "
                "so they answer different prompts."
            )
    known = ("prompt", "chosen", "rejected", "margin", "strength")
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=_number(row.get("margin"), source, "margin"),
        strength=_number(row.get("strength"), source, "strength", low=0.0, high=1.0),
        source=source,
        extra={key: value for key, value in row.items() if key not in known},
    )


def parse_group(row: Mapping[str, Any], source: str) -> CandidateGroup:
    """Returns a row's candidate group. Arguments and errors as for `parse_pair`."""
    name = "candidates" if "candidates" in row else "responses"
    if name not in row or row.get("prompt") is None:
        raise _neither(row, source, _GROUP_FORMS)
    raw = row[name]
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{source}: field '{name}' must be a list of at least one response, not {_kind(raw)}.")
    gold: list[float | None]
    if name == "responses":
        rewards = row.get("rewards")
        if rewards is not None and (not isinstance(rewards, list) or len(rewards) != len(raw)):
            raise DataError(f"{source}: field 'rewards' must be a list of {len(raw)} numbers, one per response.")
        gold = [_number(value, source, f"rewards[{index}]") for index, value in enumerate(rewards or [None] * len(raw))]
    else:
        gold = [_gold(candidate, source, f"candidates[{index}]") for index, candidate in enumerate(raw)]
    texts = [_candidate_text(candidate, source, f"{name}[{index}]") for index, candidate in enumerate(raw)]
    known_gold = [value for value in gold if value is not None]
    if known_gold and len(known_gold) < len(texts):
        raise DataError(f"{source}: only {len(known_gold)} of {len(texts)} candidates have a gold value. All or none.")
    known = ("prompt", name, "rewards") if name == "responses" else ("prompt", name)
    return CandidateGroup(
        prompt=_prompt(row["prompt"], source, "prompt"),
        candidates=texts,
        gold=known_gold or None,
        source=source,
        extra={key: value for key, value in row.items() if key not in known},
    )


def _read(path: str | Path, parse: Callable[[dict[str, Any], str], _Row], on_error: OnError | None) -> Iterator[_Row]:
    for number, line in _lines(Path(path)):
        source = f"{path}:{number}"
        try:
            row = parse(_object(line, source), source)
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        yield row


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that hold something, with their numbers from 1; a byte order mark is dropped."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield number, text
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP_MAGIC
    return gzip.open(path, "rb") if compressed else path.open("rb")


def _object(line: bytes, source: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: is no UTF-8 (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: is no JSON: {error.msg} (column {error.colno}).") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise DataError(f"{source}: has a number that is too long to read.") from error
    except RecursionError as error:
        raise DataError(f"{source}: is no JSON that can be read: too many nested brackets.") from error
    if not isinstance(row, dict):
        raise DataError(f"{source}: must be a JSON object, not {_kind(row)}.")
    return row


def _prompt(value: Any, source: str, name: str) -> Prompt:
    return value if isinstance(value, str) else _messages(value, source, name)


def _messages(value: Any, source: str, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{source}: field '{name}' must be a text or a list of messages, not {_kind(value)}.")
    for index, message in enumerate(value):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise DataError(
                f'{source}: field \'{name}[{index}]\' must be a message: {{"role": text, "content": text}}.'
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _response(value: Any, prompt: Prompt, source: str, name: str) -> str:
    """Returns the response of a row with a prompt. Messages may repeat the prompt before the answer, as some do."""
    if isinstance(value, str):
        return value
    messages = _messages(value, source, name)
    before = messages[:-1]
    as_messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[-1]["role"] != "assistant" or (before and before != as_messages):
        raise DataError(
            f"{source}: field '{name}' must be the assistant's answer alone, or the prompt's messages and then it."
        )
    return str(messages[-1]["content"])


def _split(value: Any, source: str, name: str) -> tuple[Prompt, str]:
    """Splits a whole dialogue at its last assistant turn, so that prompt and response are the dialogue as published."""
    if isinstance(value, str):
        head, turn, response = value.rpartition(_HH_TURN)
        if not turn or not head:
            raise DataError(
                f"{source}: field 'prompt' is missing and '{name}' is no dialogue of \"\\n\\nHuman: ...\" and "
                f'"\\n\\nAssistant: ..." turns. Expected {_PAIR_FORMS}.'
            )
        return head + turn, response
    messages = _messages(value, source, name)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{source}: field '{name}' must end with the assistant's answer to something, since there is no 'prompt'."
        )
    return messages[:-1], messages[-1]["content"]


def _candidate_text(candidate: Any, source: str, name: str) -> str:
    text = candidate.get("text") if isinstance(candidate, dict) else candidate
    if not isinstance(text, str):
        raise DataError(f"{source}: field '{name}' must be a text, or an object with one as 'text', not {_kind(text)}.")
    return text


def _gold(candidate: Any, source: str, name: str) -> float | None:
    if not isinstance(candidate, dict):
        return None
    for key in _GOLD_FIELDS:
        if candidate.get(key) is not None:
            return _number(candidate[key], source, f"{name}.{key}")
    return None


def _number(value: Any, source: str, name: str, *, low: float = -math.inf, high: float = math.inf) -> float | None:
    if value is None:
        return None
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise DataError(f"{source}: field '{name}' is too large.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{source}: field '{name}' must be a finite number, not {_kind(value)}.")
    if not low <= value <= high:
        raise DataError(f"{source}: field '{name}' is {value:g}; it must be {low:g} to {high:g}.")
    return float(value)


def _neither(row: Mapping[str, Any], source: str, forms: str) -> DataError:
    found = ", ".join(repr(str(key)[:40]) for key in list(row)[:12]) or "none"
    return DataError(f"{source}: has the fields {found}; expected {forms}.")


def _kind(value: Any) -> str:
    """Names a value's JSON type; the value itself may be someone's text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    names = {type(None): "null", bool: "a boolean", str: "a text", list: "a list", dict: "an object"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")
