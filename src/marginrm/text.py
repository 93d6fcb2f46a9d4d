"""Types of texts and of the options that go with them, shared by library, client, service and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Message = Mapping[str, Any]  # {"role", "content"}; a turn with tools has `tool_calls` or `name` too
Prompt = str | Sequence[Message]  # a lone user message, or the messages before the response
Truncation = Literal["error", "prompt_left"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # of a model's backbone; its head is always float32

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # names of served models and of API keys
