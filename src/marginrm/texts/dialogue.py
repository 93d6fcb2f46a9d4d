r"""Conversations as published data writes them -> messages before the response, and the response.

Read are texts, one message, lists of messages (`{"role", "content"}`, or ShareGPT's `{"from", "value"}`), contents in
parts, messages as JSON or Python texts (of files whose columns are texts), and the `\n\nHuman:` and `\n\nAssistant:` texts of HH-RLHF (arXiv 2204.05862).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from marginrm.errors import DataError, InvalidTextError
from marginrm.text import Message, Prompt
from marginrm.texts.json_lines import json_kind
from marginrm.texts.messages import normalised

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_KEYS = (("role", "content"), ("from", "value"))
_WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
_ROLES = {  # of HH-RLHF, ShareGPT, OpenAssistant and others, in lower case
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a row, for errors.

    Attributes:
        source: `path:line`.
        name: Such as `chosen[0]`.
    """

    source: str
    name: str

    def at(self, place: int | str) -> Field:
        """Returns an item or a key of this field."""
        return replace(self, name=f"{self.name}[{place}]" if isinstance(place, int) else f"{self.name}.{place}")

    def error(self, reason: str, detail: str) -> DataError:
        """Returns the error that this field has."""
        return DataError.of_row(self.source, reason, f"field '{self.name}' {detail}")


@dataclass(frozen=True, slots=True)
class Response:
    """A response and the turns that its field repeats before it.

    Attributes:
        text: The assistant's answer.
        before: The turns before it; empty if the field holds the answer alone.
    """

    text: str
    before: tuple[Message, ...] = ()


def read_prompt(value: Any, field: Field) -> Prompt | None:
    """Returns a prompt as it is, if it is a text, or as messages; None if there is none (null or an empty list)."""
    value = _decoded(value, field)
    if value is None or value == []:
        return None
    return value if isinstance(value, str) else read_messages(_listed(value), field)


def read_response(value: Any, field: Field) -> Response:
    """Returns a response, given as a text, as a message, or as a dialogue that ends with it.

    Raises:
        DataError: The value has another form, or its last turn is not an answer.
    """
    value = _decoded(value, field)
    if isinstance(value, str):
        if not _HH_TURN.match(value):
            return Response(value)
        messages = _hh_messages(value)
    elif isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return Response(value[0])
    elif value is None:
        raise field.error("with a null response", "is null. Each row needs both responses.")
    else:
        messages = read_messages(_listed(value), field)
    last = messages[-1]
    if last["role"] != "assistant":
        raise field.error("ending before the answer", "must end with the assistant's answer.")
    if not last["content"] and "tool_calls" in last:
        raise field.error("with a tool call as the response", "must end with a text, not with a tool call alone.")
    return Response(last["content"], tuple(messages[:-1]))


def read_messages(value: Any, field: Field) -> list[Message]:
    """Returns a list of messages as `{"role", "content"}`, with contents in parts joined and fields of null left out.

    Raises:
        DataError: The value is not a list of messages.
    """
    if not isinstance(value, list) or not value:
        raise field.error("with malformed messages", f"must be a text or a list of messages, not {json_kind(value)}.")
    return [_message(message, field.at(index)) for index, message in enumerate(value)]


def prompt_of(prompt: Prompt | None, response: Response, field: Field) -> Prompt:
    """Returns the whole prompt of a response, from its row's prompt and the turns before it.

    Data sets repeat the prompt in the response's field, often with a system turn before it or with later turns after it,
    and some give only its first user message as the prompt. Then the dialogue is the prompt.

    Raises:
        DataError: There is no prompt, or the dialogue does not contain it.
    """
    if not response.before:
        if prompt is None:
            raise field.error("without a prompt", "must be a whole dialogue, since there is no 'prompt'.")
        return prompt
    before = list(response.before)
    if not prompt:
        return before
    if before in (prompt, [{"role": "user", "content": prompt}]):
        return prompt
    asked = _as_messages(prompt)
    if _contains(before, asked):
        return before
    if _comparable(asked)[-len(before) :] == _comparable(before):  # without the system turn of the prompt, say
        return prompt
    if before[0]["role"] in ("assistant", "tool"):  # the turns of a completion, after the prompt
        return [*asked, *before]
    raise field.error("with a dialogue of another prompt", "is a dialogue that does not contain the row's 'prompt'.")


def same_prompt(first: Prompt, second: Prompt) -> bool:
    """Tells whether two prompts have the same turns, apart from white space around them."""
    return first == second or _comparable(_as_messages(first)) == _comparable(_as_messages(second))


def _as_messages(prompt: Prompt) -> list[Message]:
    if not isinstance(prompt, str):
        return list(prompt)
    if _HH_TURN.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        return _hh_messages(prompt)[:-1]
    return [{"role": "user", "content": prompt}]


def _hh_messages(text: str) -> list[Message]:
    parts = _HH_TURN.split(text)[1:]
    return [
        {"role": _role(role), "content": content.strip()}
        for role, content in zip(parts[0::2], parts[1::2], strict=True)
    ]


def _listed(value: Any) -> Any:
    """Returns one message as a list, and lists of roles and of contents, as `datasets` gives them, as messages."""
    if not isinstance(value, Mapping):
        return value
    columns = {key: items for key, items in value.items() if isinstance(items, list)}
    lengths = {len(items) for items in columns.values()}
    if len(lengths) != 1 or not any(columns.keys() >= set(names) for names in _KEYS):
        return [value]
    return [{key: items[index] for key, items in columns.items()} for index in range(lengths.pop())]


def _decoded(value: Any, field: Field) -> Any:
    """Returns messages that are written as a JSON or Python text; any other value as it is.

    Raises:
        DataError: They are written in another way, such as by numpy, which leaves out commas.
    """
    if not isinstance(value, str) or not _WRITTEN.match(value):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list) else value
    raise field.error("with messages as a broken text", "holds messages as a text that is neither JSON nor Python.")


def _message(value: Any, field: Field) -> Message:
    if isinstance(value, Mapping) and "from" in value and "value" in value:
        value = {**value, "role": value["from"], "content": value["value"]}
    if isinstance(value, Mapping) and isinstance(value.get("role"), str):
        value = {**value, "role": _role(value["role"])}
    try:
        return normalised(value, field.name, other_fields=True)
    except InvalidTextError as error:
        quoted = error.about(f"field '{error.param}'")
        raise DataError.of_row(field.source, "with malformed messages", str(quoted)) from error


def _role(name: str) -> str:
    """Returns the role that chat templates know by another name in published data; an unknown one as it is."""
    lower = name.strip().lower()
    return _ROLES.get(lower, lower if lower in ("system", "user", "assistant", "tool") else name)


def _contains(dialogue: Sequence[Message], messages: Sequence[Message]) -> bool:
    turns, wanted = _comparable(dialogue), _comparable(messages)
    return any(turns[start : start + len(wanted)] == wanted for start in range(len(turns) - len(wanted) + 1))


def _comparable(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "content": message["content"].strip()} for message in messages]
