"""Types of texts and of the options that go with them, and the checks of values that come from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from marginrm.errors import ConfigError, EmptyTextError, InvalidTextError

Message = Mapping[str, Any]  # {"role", "content"}; a turn with tools has `tool_calls` or `name` too
Prompt = str | Sequence[Message]  # a lone user message, or the messages before the response
Response = str | Sequence[str] | Sequence[Message]  # a text, the steps that a process reward model reads, or turns
Truncation = Literal["error", "prompt_left"]
AnyTruncation = Literal["error", "prompt_left", "longest_first"]  # the last one for rerankers' documents only
Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # of a model's backbone; its head is always float32

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # names of served models and of API keys


def check_choice(value: object, name: str, choices: Any) -> None:
    """Checks an option that has a few values.

    Args:
        value: The value given.
        name: The option's name, as its user typed it.
        choices: A `Literal` type with the values allowed.

    Raises:
        ConfigError: The value is not one of them; the message lists them.
    """
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{name} = {value!r} is not a valid value. Use one of: {', '.join(map(str, allowed))}.")


def check_text(value: Any, param: str) -> None:
    """Checks one text.

    Raises:
        InvalidTextError: The value is not a string, or holds half of a surrogate pair.
        EmptyTextError: The value is empty or white space only.
    """
    if not isinstance(value, str):
        raise InvalidTextError(f"{{param}} must be a string, not {type(value).__name__}.", param=param)
    if not value.strip():
        raise EmptyTextError("{param} is empty.", param=param)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidTextError(
            f"{{param}} has a lone surrogate at character {error.start}, which is not valid Unicode.", param=param
        ) from error
