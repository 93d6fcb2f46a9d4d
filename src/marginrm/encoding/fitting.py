"""Cuts token ids to a model's limit: the prompt from its left, or prompt and response as rerankers do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Encoding

from marginrm.encoding.token_ids import Ids
from marginrm.errors import InvalidTextError, SequenceTooLongError
from marginrm.text import AnyTruncation


@dataclass(slots=True)
class Draft:
    """A sequence before the length check.

    Attributes:
        ids: Token ids, [tokens].
        type_ids: Segment ids, [tokens], or None.
        prompt: The indices of tokens that belong to the prompt.
        response: The indices of tokens that belong to the response, its end marker excluded.
        keeps_prompt_end: A prompt that `longest_first` cuts loses its beginning, in place of its end.
        shortened: Whether tokens of the response were cut already.
        read_at: The indices of the tokens that step rewards are read at, all of them behind the prompt; None for one
            reward per response. Such a response is never cut.
    """

    ids: Ids
    type_ids: Ids | None
    prompt: range = range(0)
    response: range = range(0)
    keeps_prompt_end: bool = True
    shortened: bool = False
    read_at: tuple[int, ...] | None = None


def shorten(draft: Draft, most_tokens: int | None) -> Draft:
    """Cuts the end of a response with more tokens than `most_tokens`, in place, and returns the draft that is left."""
    spare = 0 if most_tokens is None else len(draft.response) - most_tokens
    if spare <= 0:
        return draft
    _remove(draft, draft.response[-spare:])
    return replace(draft, response=draft.response[:-spare], shortened=True)


def common_cut(drafts: Sequence[Draft], limit: int, truncation: AnyTruncation) -> int:
    """Returns how many tokens every prompt of a group loses by `prompt_left`: what its longest sequence needs.

    Rewards of one group are compared, and with cuts of their own they would belong to different prompts. Sequences that
    no cut of the prompt can make fit do not count.
    """
    if truncation != "prompt_left":
        return 0
    needed = ((len(draft.ids) - limit, len(draft.prompt)) for draft in drafts)
    return max((excess for excess, prompt in needed if 0 < excess < prompt), default=0)


def fit(draft: Draft, limit: int, truncation: AnyTruncation, least: int = 0) -> bool:
    """Cuts a draft to a limit, in place.

    Args:
        draft: The sequence.
        limit: The most tokens that it may have.
        truncation: As for `Encoder.encode_group`.
        least: Cut at least this many tokens of the prompt, but leave one.

    Returns:
        Whether tokens were cut.

    Raises:
        SequenceTooLongError: It is too long, and this truncation cannot make it fit.
    """
    excess = max(len(draft.ids) - limit, min(least, len(draft.prompt) - 1))
    if excess <= 0:
        return draft.shortened
    if truncation == "error":
        raise SequenceTooLongError(len(draft.ids), limit)
    prompt, response = _shares(draft, excess) if truncation == "longest_first" else (excess, 0)
    if prompt >= max(len(draft.prompt), 1) or response >= max(len(draft.response), 1):
        kept = len(draft.ids) - len(draft.prompt)
        raise SequenceTooLongError(
            len(draft.ids),
            limit,
            f"{len(draft.ids):,} tokens; this model takes {limit:,}, and the response and its markers "
            f"alone have {kept:,}, which are never cut. Shorten the response.",
            param="response",
        )
    _remove(draft, range(draft.response.stop - response, draft.response.stop))
    first = draft.prompt.start if draft.keeps_prompt_end or truncation == "prompt_left" else draft.prompt.stop - prompt
    _remove(draft, range(first, first + prompt))
    if draft.read_at is not None:
        draft.read_at = tuple(at - prompt for at in draft.read_at)
    return True


def token_range(encoding: Encoding, start: int, end: int) -> range:
    """Returns the tokens that lie within a range of characters, special tokens without characters excluded."""
    inside = [index for index, (begin, stop) in enumerate(encoding.offsets) if start <= begin < stop <= end]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def tokens_at(encoding: Encoding, characters: Sequence[int]) -> tuple[int, ...]:
    """Returns the index of the last token that holds each character.

    Raises:
        InvalidTextError: The tokenizer drops one.
    """
    offsets = np.array(encoding.offsets)
    found = []
    for at in characters:
        holding = np.flatnonzero((offsets[:, 0] <= at) & (at < offsets[:, 1]))
        if not len(holding):
            raise InvalidTextError("The tokenizer drops the separator after a step.", param="response")
        found.append(int(holding[-1]))
    return tuple(found)


def sequence_range(encoding: Encoding, sequence: int) -> range:
    """Returns the token range of one sequence of a text pair, special tokens excluded."""
    indices = [index for index, owner in enumerate(encoding.sequence_ids) if owner == sequence]
    return range(indices[0], indices[-1] + 1) if indices else range(0)


def _shares(draft: Draft, excess: int) -> tuple[int, int]:
    """Returns how many tokens prompt and response lose by `longest_first`, as the `tokenizers` library has it."""
    prompt, response = len(draft.prompt), len(draft.response)
    room = max(prompt + response - excess, 0)
    shorter = min(prompt, response, room // 2)
    kept_prompt, kept_response = (room - shorter, shorter) if prompt > response else (shorter, room - shorter)
    return prompt - kept_prompt, response - kept_response


def _remove(draft: Draft, cut: range) -> None:
    places = slice(cut.start, cut.stop)
    draft.ids = np.delete(draft.ids, places)
    if draft.type_ids is not None:
        draft.type_ids = np.delete(draft.type_ids, places)
