"""Tokenising with a net under it: a text on which the tokenizer itself fails costs its request nothing but its reward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from marginrm.encoding import EncodedResponse, Encoder
from marginrm.errors import EncodingError
from marginrm.text import Truncation
from marginrm_service.errors import TokenizerFailedError

_log = logging.getLogger(__name__)

Encoded = EncodedResponse | EncodingError | TokenizerFailedError


def encode_group(encoder: Encoder, prompt: Any, responses: Sequence[Any], truncation: Truncation) -> Sequence[Encoded]:
    """Encodes as `Encoder.encode_group`, in halves where that raises, until what is at fault is alone."""
    try:
        return encoder.encode_group(prompt, responses, truncation)
    except BaseException as error:
        if not _is_tokenizers_fault(error):
            raise
        if len(responses) == 1:
            return [_failed(error)]
    middle = len(responses) // 2
    return [
        outcome
        for half in (responses[:middle], responses[middle:])
        for outcome in encode_group(encoder, prompt, half, truncation)
    ]


def encode_text(encoder: Encoder, text: Any, truncation: Truncation) -> Encoded:
    """Encodes as `Encoder.encode_text`, and returns what that raises."""
    try:
        return encoder.encode_text(text, truncation)
    except EncodingError as error:
        return error
    except BaseException as error:
        if not _is_tokenizers_fault(error):
            raise
        return _failed(error)


def _is_tokenizers_fault(error: BaseException) -> bool:
    """Panics of libraries in Rust are no `Exception`, and their class cannot be imported."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _failed(error: BaseException) -> TokenizerFailedError:
    _log.error("The tokenizer failed on a text", exc_info=error)
    return TokenizerFailedError("The tokenizer failed on this text.")
