"""Chat messages as clients and data sets write them -> the form that a chat template renders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from marginrm.errors import EmptyTextError, InvalidTextError
from marginrm.text import check_text

# Fields beside role and content that chat templates render. Templates of transformers take them by these names.
_FIELDS = ("tool_calls", "name", "tool_call_id", "reasoning_content", "thinking")


def normalised(message: Any, param: str, *, other_fields: bool = False) -> dict[str, Any]:
    """Returns a message with its content as one text and without empty optional fields.

    A content in parts is joined. Null beside tool calls becomes an empty text, as vLLM has it, because templates would
    write `None`. Arguments of tool calls in JSON become objects, which is the form that templates expect.

    Args:
        message: `{"role", "content"}`, and `tool_calls`, `name` and the like.
        param: The message's field, for errors.
        other_fields: Leave out fields of other names instead of refusing them.

    Raises:
        InvalidTextError: The value is not a message.
    """
    if not isinstance(message, Mapping) or "role" not in message or not message.keys() & {"content", "tool_calls"}:
        raise InvalidTextError('{param} must be a message: {"role": text, "content": text}.', param=param)
    kept = {key: value for key, value in message.items() if key not in ("role", "content") and value not in (None, [])}
    unknown = sorted(str(key)[:40] for key in kept if key not in _FIELDS)
    if unknown and not other_fields:
        raise InvalidTextError(
            f"{{param}} has the fields {', '.join(unknown)}; a message has role, content, {', '.join(_FIELDS)}.",
            param=param,
        )
    if not isinstance(message["role"], str):
        raise InvalidTextError("{param} must be a text.", param=f"{param}.role")
    found: dict[str, Any] = {
        "role": message["role"],
        "content": content_text(message.get("content"), f"{param}.content", kept),
    }
    found |= {key: kept[key] for key in _FIELDS if key in kept}
    if "tool_calls" in found:
        found["tool_calls"] = _tool_calls(found["tool_calls"], f"{param}.tool_calls")
    return found


def check_messages(prompt: Any) -> list[dict[str, Any]]:
    """Returns a prompt as a list of messages that ends before the response.

    Raises:
        InvalidTextError: The prompt is not a string or a list of messages, or its last turn is the assistant's.
        EmptyTextError: The prompt or one of its messages is empty.
    """
    if isinstance(prompt, str):
        check_text(prompt, "prompt")
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise InvalidTextError(
            f'{{param}} must be a string or a list of {{"role", "content"}} messages, not {type(prompt).__name__}.',
            param="prompt",
        )
    if not prompt:
        raise EmptyTextError("{param} has no messages.", param="prompt")
    messages = []
    for index, message in enumerate(prompt):
        where = f"prompt[{index}]"
        found = normalised(message, where)
        check_text(found["role"], f"{where}.role")
        if found["content"] or not may_be_empty(found):
            check_text(found["content"], f"{where}.content")
        if len(found) > 2:
            check_text(json.dumps(found, ensure_ascii=False), where)  # a lone surrogate may be in any of its fields
        messages.append(found)
    if messages[-1]["role"] == "assistant":
        raise InvalidTextError(
            "The prompt must end before the answer that is scored, so its last message cannot be the assistant's.",
            param=f"prompt[{len(messages) - 1}].role",
            reason="with a prompt that ends with an answer",
        )
    return messages


def read_response(response: Any, *, takes_steps: bool) -> str | list[str] | list[dict[str, Any]]:
    """Returns a response as an encoder takes it: a text, steps, or several turns.

    Agents answer in turns: a call of a tool, its result, another answer. Such a response may end with any of them, and
    its last answer may be empty: the model ended its turn at once. A lone answer in a list is its text.

    Args:
        response: A text, a list of steps, or a list of messages.
        takes_steps: Whether the model reads steps.

    Raises:
        InvalidTextError: It has another form, or one that this model does not read.
        EmptyTextError: The text, or one of the steps, is empty.
    """
    if not isinstance(response, list | tuple):
        check_text(response, "response")
        return str(response)
    if response and isinstance(response[0], Mapping):
        return _turns(response, takes_steps=takes_steps)
    if not takes_steps:
        raise InvalidTextError(
            "{param} is a list of steps, and this model gives one reward per response. Send one string.",
            param="response",
        )
    if not response:
        raise EmptyTextError("{param} is an empty list of steps.", param="response")
    for step in response:
        check_text(step, "response")
    return list(response)


def _turns(response: Sequence[Any], *, takes_steps: bool) -> str | list[dict[str, Any]]:
    turns = [normalised(turn, f"response[{index}]") for index, turn in enumerate(response)]
    if takes_steps:
        raise InvalidTextError(
            "{param} is a list of messages, and this model reads steps. Send the steps as strings.", param="response"
        )
    last = turns[-1]
    if turns[0]["role"] != "assistant" or last["role"] not in ("assistant", "tool"):
        raise InvalidTextError(
            "{param} must start with the assistant's turn, and end with the assistant's or a tool's.", param="response"
        )
    check_text(json.dumps(turns, ensure_ascii=False), "response")  # a lone surrogate may be in any field
    return last["content"] if len(turns) == 1 and last.keys() == {"role", "content"} else turns


def as_turns(response: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a response as the turns that follow the prompt."""
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    return [dict(turn) for turn in response]


def may_be_empty(message: Mapping[str, Any]) -> bool:
    """Tells whether a message may have an empty content: a system turn, a tool's result, or a turn with tool calls."""
    return message["role"] in ("system", "tool") or "tool_calls" in message


def plain_text(message: Mapping[str, Any]) -> str:
    """Returns a normalised message without a template: its content, then each of its tool calls as a line of JSON."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


def content_text(content: Any, param: str, beside: Mapping[str, Any] | None = None) -> str:
    """Returns a message's content as one text.

    Args:
        content: A text, one `{"type": "text", "text"}` part, a list of texts or parts, or null beside tool calls.
        param: The content's field, for errors.
        beside: The message's other fields.

    Raises:
        InvalidTextError: The content is not text.
    """
    if content is None and beside and "tool_calls" in beside:
        return ""
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, list):
        return "".join(_part(part, f"{param}[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise InvalidTextError(
            f"{{param}} must be a text or a list of text parts, not {type(content).__name__}.", param=param
        )
    return content


def _part(part: Any, param: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise InvalidTextError('{param} must be a text or {"type": "text", "text": text}.', param=param)
    return text


def _tool_calls(calls: Any, param: str) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise InvalidTextError("{param} must be a list of tool calls.", param=param)
    return [_with_arguments(call) for call in calls]


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return dict(call)  # half a call, as a model may write it, stays as it is
    return {**call, "function": {**function, "arguments": arguments}}
