"""Tokenising in a pool, with fault isolation: if the tokenizer crashes on one text, only that text gets an error."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from marginrm.encoding import EncodedResponse, Encoder
from marginrm.errors import EncodingError, SequenceTooLongError
from marginrm.text import AnyTruncation
from marginrm_service.engine.request import TextGroup
from marginrm_service.errors import TokenizerFailedError

_log = logging.getLogger(__name__)

Encoded = EncodedResponse | EncodingError | TokenizerFailedError

# The most work of one call in the pool: little enough that a single pair soon gets its turn.
_CHUNK_RESPONSES = 64
_CHUNK_CHARACTERS = 200_000
# No tokenizer in use packs more characters than this into each token of a real text (the longest tokens are runs of
# spaces). A longer text cannot fit, and is refused before time is spent on tokenising it.
_CHARACTERS_PER_TOKEN = 64
_CHARACTERS_PER_ID = 4  # of a token of English text, about


@dataclass(frozen=True, slots=True)
class _Span:
    """Responses `start` to `stop` (exclusive) of a group."""

    group: int
    start: int
    stop: int


async def encode(
    encoder: Encoder, groups: Sequence[TextGroup], truncation: AnyTruncation, pool: Executor
) -> list[list[Encoded]]:
    """Encodes all responses of a request in a pool of threads.

    Args:
        encoder: The model's encoder.
        groups: Prompts with their responses, of any type: the encoder gives an error for a value that is not a text.
        truncation: The treatment of sequences above the model's limit.
        pool: Threads that tokenise.

    Returns:
        For each group one outcome per response.
    """
    encoded: list[list[Encoded]] = [[] for _ in groups]

    def encode_chunk(chunk: Sequence[_Span]) -> None:
        for span in chunk:
            group = groups[span.group]
            part = replace(group, responses=group.responses[span.start : span.stop])
            encoded[span.group] += encode_unless_oversized(encoder, part, truncation)

    loop = asyncio.get_running_loop()
    parts: Counter[int] = Counter()
    for chunk in _chunks(groups, whole=truncation == "prompt_left"):
        parts.update(span.group for span in chunk)
        await loop.run_in_executor(pool, encode_chunk, chunk)
    for number, count in parts.items():
        if count > 1:
            await loop.run_in_executor(pool, _find_removals, encoder, groups[number], truncation, encoded[number])
    return encoded


def _find_removals(encoder: Encoder, group: TextGroup, truncation: AnyTruncation, outcomes: list[Encoded]) -> None:
    """Encodes responses again, together, that have equal tokens and were encoded in different parts.

    The encoder sees only then that they differ in what a chat template removes, and gives each an error.

    Args:
        encoder: The model's encoder.
        group: The group.
        truncation: The treatment of sequences above the model's limit.
        outcomes: One per response; replaced in place.
    """
    same: dict[tuple[bytes, tuple[int, ...] | None], list[int]] = {}
    for index, one in enumerate(outcomes):
        if isinstance(one, EncodedResponse):
            same.setdefault((one.array.tobytes(), one.read_at), []).append(index)
    for indices in same.values():
        responses = [group.responses[index] for index in indices]
        if any(response != responses[0] for response in responses):
            together = encode_unless_oversized(encoder, replace(group, responses=responses), truncation)
            for index, one in zip(indices, together, strict=True):
                outcomes[index] = one


def text_length(value: Any) -> int:
    """Returns the characters of a text, of steps, of messages or, about, of token ids; 0 for any other value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list) and value and isinstance(value[0], int):
        return len(value) * _CHARACTERS_PER_ID
    if isinstance(value, list):
        steps = sum(len(step) for step in value if isinstance(step, str))
        return steps + sum(
            len(m["content"]) for m in value if isinstance(m, dict) and isinstance(m.get("content"), str)
        )
    return 0


def encode_unless_oversized(encoder: Encoder, group: TextGroup, truncation: AnyTruncation) -> list[Encoded]:
    """Encodes the responses of a group, except those that are too long for any tokenizer to make fit."""
    longest = encoder.max_length * _CHARACTERS_PER_TOKEN
    responses = group.responses
    if truncation == "longest_first":  # these ends would be cut anyway
        responses = [response[:longest] if isinstance(response, str) else response for response in responses]
        if isinstance(group.prompt, str):
            kept = slice(longest) if encoder.architecture == "encoder" else slice(-longest, None)
            group = replace(group, prompt=group.prompt[kept])
        longest += longest
    prompt_length = text_length(group.prompt)
    lengths = [prompt_length + text_length(response) for response in responses]
    usable = [response for response, length in zip(responses, lengths, strict=True) if length <= longest]
    encoded = iter(_encode_isolated(encoder, group, usable, truncation) if usable else [])
    param = "prompt" if prompt_length > longest else "response"
    return [
        next(encoded) if length <= longest else _oversized_error(length, encoder.max_length, param)
        for length in lengths
    ]


def _chunks(groups: Sequence[TextGroup], *, whole: bool) -> Iterator[list[_Span]]:
    """Cuts a request into parts of about equal work for the pool.

    Args:
        groups: The request.
        whole: Keep the responses of a group together, since their prompt is cut once for all.
    """
    chunk: list[_Span] = []
    responses = characters = 0
    for number, group in enumerate(groups):
        prompt_length = text_length(group.prompt)
        start = 0
        for index, response in enumerate(group.responses):
            size = prompt_length + text_length(response)
            full = responses >= _CHUNK_RESPONSES or characters + size > _CHUNK_CHARACTERS
            if responses and full and not (whole and index > start):
                yield [*chunk, _Span(number, start, index)] if index > start else chunk
                chunk, start, responses, characters = [], index, 0, 0
            responses, characters = responses + 1, characters + size
        chunk.append(_Span(number, start, len(group.responses)))
    yield chunk


def _encode_isolated(
    encoder: Encoder, group: TextGroup, responses: Sequence[Any], truncation: AnyTruncation
) -> Sequence[Encoded]:
    """Encodes responses of a group. If that raises, they are bisected until the failing texts are isolated."""
    try:
        return _encode_form(encoder, group, responses, truncation)
    except BaseException as error:
        if len(responses) == 1 and isinstance(error, EncodingError):
            return [error]
        if not _is_tokenizer_fault(error):
            raise
        if len(responses) == 1:
            return [_failed(error)]
    middle = len(responses) // 2
    return [
        outcome
        for half in (responses[:middle], responses[middle:])
        for outcome in _encode_isolated(encoder, group, half, truncation)
    ]


def _encode_form(
    encoder: Encoder, group: TextGroup, responses: Sequence[Any], truncation: AnyTruncation
) -> Sequence[Encoded]:
    """Encodes responses by the form of their group.

    Raises:
        EncodingError: A text or generation is unusable.
    """
    match group.form:
        case "conversation":
            return encoder.encode_group(group.prompt, responses, truncation)
        case "document":
            return encoder.encode_group(
                group.prompt, responses, truncation, allow_empty=True, most_tokens=group.most_tokens
            )
        case "generation":
            return [encoder.encode_generation(group.prompt, response) for response in responses]
        case "text" | "ended_text":
            ended = group.form == "ended_text"
            return [encoder.encode_text(text, truncation, ended=ended) for text in responses]


def _is_tokenizer_fault(error: BaseException) -> bool:
    """Whether the tokenizer failed. A panic in Rust is not an `Exception`, and its class cannot be imported."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _failed(error: BaseException) -> TokenizerFailedError:
    _log.error("The tokenizer failed on a text", exc_info=error)
    return TokenizerFailedError("The tokenizer failed on this text.")


def _oversized_error(characters: int, limit: int, param: str) -> SequenceTooLongError:
    return SequenceTooLongError(
        characters // _CHARACTERS_PER_TOKEN,
        limit,
        f"{characters:,} characters cannot fit into the {limit:,} tokens that this model takes. Shorten the {param}.",
        param=param,
    )
