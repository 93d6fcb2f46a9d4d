"""(prompt, response) -> token ids: the one place where training and serving agree on what a model reads.

A tokenizer with a chat template renders the conversation with it; one without gets prompt + response + EOS; an encoder
(BERT and kin) gets prompt and response as a text pair. The reward is later read at the last token of a decoder's
sequence and at the first of an encoder's, always by position, so nothing here depends on a padding token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from marginrm.errors import EmptyTextError, EncodingError, InvalidTextError, ModelError, SequenceTooLongError
from marginrm.manifest import EncodingInfo, template_hash
from marginrm.messages import may_be_empty, normalised
from marginrm.text import Prompt, Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Architecture = Literal["decoder", "encoder"]

_SENTINEL = "\ue000"  # a private-use character, which no response starts with

# Some templates print today's date, which would make a reward depend on the day. This macro goes before them and takes
# the place of the function that they ask; the date is the one that Llama 3's own template falls back to.
_FIXED_DATE = "26 Jul 2024"
_DATELESS = "{%- macro strftime_now(format) -%}" + _FIXED_DATE + "{%- endmacro -%}"


@dataclass(frozen=True, slots=True)
class EncodedResponse:
    """One response, with its prompt, as a model reads it.

    Attributes:
        ids: Token ids of the whole sequence, special tokens included.
        type_ids: Segment ids of the same length for encoders that use them, else None.
        truncated: Whether tokens were cut from the left of the prompt.
        array: The token ids as [tokens] int32, made once, for array code such as `packing`.
    """

    ids: tuple[int, ...]
    type_ids: tuple[int, ...] | None = None
    truncated: bool = False
    array: NDArray[np.int32] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "array", np.fromiter(self.ids, np.int32, len(self.ids)))


@dataclass(frozen=True, slots=True)
class _Draft:
    """A sequence before the length check: `removable` is the range of token indices that belong to the prompt."""

    ids: list[int]
    type_ids: list[int] | None
    removable: range


@functools.lru_cache(maxsize=4)
def _backend(serialised: str) -> Tokenizer:
    """Makes a tokenizer of what `to_str` wrote; equal ones are one.

    Each thread that tokenises remembers words for each tokenizer for as long as it lives, even when the tokenizer is
    gone (tokenizers 0.23; clearing its cache does not help). So a server whose models are swapped must not make anew
    what it has.
    """
    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Encoder:
    """Turns (prompt, response) into token ids for one tokenizer and one kind of model.

    Thread-safe: it works on a copy of the tokenizer, which nobody changes, with the padding and truncation that some
    tokenizer files carry switched off.

    Args:
        tokenizer: A transformers tokenizer with the `tokenizers` back end (all current families have it).
        max_length: The most tokens a sequence may have, special tokens included.
        architecture: `decoder` (causal, reward at the last token) or `encoder` (reward at the first).

    Raises:
        ModelError: The tokenizer has no `tokenizers` back end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, architecture: Architecture) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                f"{type(tokenizer).__name__} has no fast tokenizer. Save the checkpoint with a tokenizer.json "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.architecture: Architecture = architecture
        self._backend = _backend(backend.to_str())
        self._templated = architecture == "decoder" and bool(tokenizer.chat_template)
        self._chat_template = _dateless(tokenizer.get_chat_template()) if self._templated else None
        self._bos = self._leading_bos()

    def encode(self, prompt: Prompt, response: str, truncation: Truncation = "error") -> EncodedResponse:
        """Encodes one response to a prompt.

        Args:
            prompt: A string (one user message) or a list of `{"role", "content"}` messages ending before the response.
            response: The assistant's answer.
            truncation: `error` refuses what is too long; `prompt_left` cuts the prompt from its left, and never the
                response nor the end marker.

        Returns:
            The token ids and whether the prompt was cut.

        Raises:
            EncodingError: The texts are unusable, or too long under this truncation.
        """
        outcome = self.encode_group(prompt, [response], truncation)[0]
        if isinstance(outcome, EncodingError):
            raise outcome
        return outcome

    def encode_group(
        self, prompt: Prompt, responses: Sequence[str], truncation: Truncation = "error"
    ) -> list[EncodedResponse | EncodingError]:
        """Encodes all responses to one prompt in one tokenizer call.

        Returns:
            One outcome per response, in order: its encoding, or the error that makes it unusable. A bad prompt makes
            every response unusable; a bad response only itself.
        """
        try:
            messages = _checked_messages(prompt)
        except EncodingError as error:
            return [error.about(error.param or "prompt") for _ in responses]
        outcomes: list[EncodedResponse | EncodingError | None] = [None] * len(responses)
        good = []
        for index, response in enumerate(responses):
            try:
                _check_text(response, "response")
                good.append(index)
            except EncodingError as error:
                outcomes[index] = error
        try:
            drafts = self._drafts(messages, [responses[index] for index in good])
        except EncodingError as error:
            drafts = [error.about(error.param or "prompt") for _ in good]
        for index, draft in zip(good, drafts, strict=True):
            outcomes[index] = draft if isinstance(draft, EncodingError) else self._fitted(draft, truncation)
        return [outcome for outcome in outcomes if outcome is not None]

    def encode_text(self, text: str, truncation: Truncation = "error") -> EncodedResponse:
        """Encodes a text that a client has templated already; special tokens that it holds are not added again.

        Raises:
            EncodingError: The text is unusable, or too long under this truncation (`prompt_left` cuts from the left).
        """
        _check_text(text, "text")
        if self.architecture == "encoder":
            encoding = self._backend.encode(text, add_special_tokens=True)
            draft = _Draft(encoding.ids, encoding.type_ids, _sequence_range(encoding, 0))
        else:
            ids, _ = self._framed(self._backend.encode(text, add_special_tokens=False).ids)
            draft = _Draft(ids, None, range(self._start, len(ids) - 1))
        outcome = self._fitted(draft, truncation)
        if isinstance(outcome, EncodingError):
            raise outcome
        return outcome

    def describe(self) -> EncodingInfo:
        """Returns what a manifest records of the encoding, so that a server can tell whether it reads as trained."""
        return EncodingInfo(
            architecture=self.architecture,
            template_hash=template_hash(self._chat_template) if self._chat_template else None,
            max_length=self.max_length,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            pooling="last" if self.architecture == "decoder" else "first",
        )

    def _drafts(self, messages: list[dict[str, Any]], responses: list[str]) -> list[_Draft | EncodingError]:
        if self.architecture == "encoder":
            prompt = _transcript(messages)
            encodings = self._backend.encode_batch([(prompt, text) for text in responses], add_special_tokens=True)
            return [_Draft(e.ids, e.type_ids, _sequence_range(e, 0)) for e in encodings]
        texts, prompt_chars = self._rendered(messages, responses)
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        drafts: list[_Draft | EncodingError] = []
        for encoding, chars in zip(encodings, prompt_chars, strict=True):
            ids, moved = self._framed(encoding.ids)
            prompt_tokens = sum(end <= chars for _, end in encoding.offsets)
            drafts.append(_Draft(ids, None, range(self._start, prompt_tokens + moved)))
        return drafts

    def _rendered(self, messages: list[dict[str, Any]], responses: list[str]) -> tuple[list[str], list[int]]:
        """Returns the texts of prompt and response, and how many characters of each come before the response."""
        if not self._templated:
            prompt = _transcript(messages)
            if len(messages) > 1:
                prompt += "\n\nAssistant: "
            return [prompt + response for response in responses], [len(prompt)] * len(responses)

        def render(response: str) -> str:
            return self._template([*messages, {"role": "assistant", "content": response}])

        # Where the response starts is seen by rendering another one: a template may strip or rewrite the turns before.
        other = render(_SENTINEL)
        if _SENTINEL not in other:
            raise InvalidTextError("The model's chat template drops the last assistant turn.", param="prompt")
        texts = [render(response) for response in responses]
        return texts, [_common_length(text, other) for text in texts]

    def _template(self, messages: list[dict[str, Any]]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=self._chat_template, date_string=_FIXED_DATE
            )
        except TemplateError as error:
            raise InvalidTextError(
                f"The model's chat template refuses these messages: {str(error)[:200]}", param="prompt"
            ) from error
        return str(text)

    def _framed(self, ids: list[int]) -> tuple[list[int], int]:
        """Gives a decoder's ids exactly one BOS, where the tokenizer has one, and the end marker that they need.

        Returns:
            The ids, and by how many places their content moved to the right.
        """
        eos = self.tokenizer.eos_token_id
        doubled = 0
        while self._bos is not None and ids[doubled : doubled + 1] == [self._bos]:
            doubled += 1
        framed = ([] if self._bos is None else [self._bos]) + ids[doubled:]
        if not self._templated and eos is not None and framed[-1] != eos:
            framed.append(eos)
        return framed, self._start - doubled

    @property
    def _start(self) -> int:
        """Index of the first token after BOS."""
        return 0 if self._bos is None else 1

    def _leading_bos(self) -> int | None:
        """Returns the BOS id if this model's texts start with one."""
        bos = self.tokenizer.bos_token_id
        if bos is None or self.architecture == "encoder":
            return None
        adds_it = self._backend.encode("a", add_special_tokens=True).ids[:1] == [bos]
        if not adds_it and self._templated:
            adds_it = self._template([{"role": "user", "content": "a"}]).startswith(str(self.tokenizer.bos_token))
        return int(bos) if adds_it else None

    def _fitted(self, draft: _Draft, truncation: Truncation) -> EncodedResponse | EncodingError:
        excess = len(draft.ids) - self.max_length
        keep_type_ids = draft.type_ids is not None and "token_type_ids" in self.tokenizer.model_input_names
        types = draft.type_ids if keep_type_ids else None
        if excess <= 0:
            return EncodedResponse(tuple(draft.ids), tuple(types) if types is not None else None)
        if truncation == "error":
            return SequenceTooLongError(len(draft.ids), self.max_length)
        if excess >= len(draft.removable):
            kept = len(draft.ids) - max(len(draft.removable), 0)
            return SequenceTooLongError(
                len(draft.ids),
                self.max_length,
                f"{len(draft.ids):,} tokens; this model takes {self.max_length:,}, and the response and its markers "
                f"alone have {kept:,}, which are never cut. Shorten the response.",
                param="response",
            )
        cut = slice(draft.removable.start, draft.removable.start + excess)
        del draft.ids[cut]
        if types is not None:
            del types[cut]
        return EncodedResponse(tuple(draft.ids), tuple(types) if types is not None else None, truncated=True)


def _dateless(template: str) -> str:
    return _DATELESS + template if "strftime_now" in template else template


def _common_length(first: str, second: str) -> int:
    """Returns how many leading characters two texts share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(first), len(second)))


def _sequence_range(encoding: Encoding, sequence: int) -> range:
    """Returns the token range of one sequence of a text pair, special tokens excluded."""
    indices = [index for index, owner in enumerate(encoding.sequence_ids) if owner == sequence]
    return range(indices[0], indices[-1] + 1) if indices else range(0)


def _transcript(messages: list[dict[str, Any]]) -> str:
    """Writes a conversation as plain text: a lone message as it is, several with their roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _checked_messages(prompt: Any) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        _check_text(prompt, "prompt")
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
        _check_text(found["role"], f"{where}.role")
        if found["content"] or not may_be_empty(found):
            _check_text(found["content"], f"{where}.content")
        messages.append(found)
    if messages[-1]["role"] == "assistant":
        raise InvalidTextError(
            "The prompt must end before the answer that is scored, so its last message cannot be the assistant's.",
            param=f"prompt[{len(messages) - 1}].role",
        )
    return messages


def _check_text(value: Any, param: str) -> None:
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
