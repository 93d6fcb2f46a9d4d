"""The key of a request's prompt: requests with one prompt to one model have one key, in every contract.

The key only chooses a replica. So a prompt that is not recognised costs computation, and changes no reward.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from marginrm.text import NAME_PATTERN

# Fields that hold a prompt, or objects that do, in the bodies of all contracts; the first that is found counts.
_FIELDS = (
    *("prompt", "prompts", "query", "queries", "text_1", "data_1", "pairs", "items"),
    *("conversation_history", "responses_create_params", "messages", "input", "inputs", "text"),
)
# The end of a rendered prompt, in the templates of common model families. Trainers send prompt and response as one text.
_ANSWER_STARTS = (
    *("<|im_start|>assistant", "<|start_header_id|>assistant<|end_header_id|>", "<start_of_turn>model", "[/INST]"),
    *("<|assistant|>", "<|Assistant|>", "<｜Assistant｜>", "<|start_of_role|>assistant", "\n\nAssistant:"),
    *("### Assistant", "### Response:"),
)
_DIGEST_BYTES = 8


@dataclass(frozen=True, slots=True)
class RequestKeys:
    """Where a request belongs.

    Attributes:
        model: The name of its model; None without a valid name.
        prompt: The key of its prompt; None without a prompt.
    """

    model: str | None = None
    prompt: str | None = None


def request_keys(body: bytes) -> RequestKeys:
    """Returns model and prompt of a JSON body. The key is a 64-bit digest of both, as hexadecimal digits.

    A rendered text of prompt and response counts up to its last answer; without a known template the whole text counts.

    Args:
        body: The body of a scoring request.

    """
    try:
        fields = json.loads(body)
    except ValueError:
        return RequestKeys()
    if not isinstance(fields, dict):
        return RequestKeys()
    model, prompt = fields.get("model"), _prompt(fields)
    name = model if isinstance(model, str) and re.fullmatch(NAME_PATTERN, model) else None
    if prompt is None:
        return RequestKeys(name)
    text = json.dumps([model, prompt], sort_keys=True)
    return RequestKeys(name, hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest())


def _prompt(value: Any) -> Any:
    """Returns the first prompt in a decoded value: a text, or messages without the answer; None if there is none."""
    if isinstance(value, str):
        return value[: max(value.rfind(start) for start in _ANSWER_STARTS)] if _has_answer(value) else value
    if isinstance(value, list) and value:
        if isinstance(value[0], dict) and "role" in value[0]:
            return value[:-1] if isinstance(value[-1], dict) and value[-1].get("role") == "assistant" else value
        return _prompt(value[0])
    if isinstance(value, dict):
        found = (_prompt(value[field]) for field in _FIELDS if field in value)
        return next((prompt for prompt in found if prompt is not None), None)
    return None


def _has_answer(text: str) -> bool:
    return any(start in text for start in _ANSWER_STARTS)
