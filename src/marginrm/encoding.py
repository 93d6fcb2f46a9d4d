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
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from marginrm.errors import EncodingError, ModelError, SequenceTooLongError
from marginrm.manifest import EncodingInfo, template_hash
from marginrm.messages import check_messages
from marginrm.rendering import Renderer, transcript
from marginrm.special_tokens import EncodingPolicy, SpecialTokens
from marginrm.text import Prompt, Truncation, check_choice, check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Architecture = Literal["decoder", "encoder"]


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


EncodedGroup = Sequence[EncodedResponse]  # the responses to one prompt


@dataclass(frozen=True, slots=True)
class _Draft:
    """A sequence before the length check: `removable` is the range of token indices that belong to the prompt."""

    ids: list[int]
    type_ids: list[int] | None
    removable: range


@functools.lru_cache(maxsize=4)
def _backend(serialised: str) -> Tokenizer:
    """Makes a tokenizer from the text that `to_str` wrote; equal texts share one tokenizer.

    Each thread that tokenises keeps a cache of words for each tokenizer as long as the thread lives, even after the
    tokenizer is gone (tokenizers 0.23; clearing its cache does not help). So a server whose models are swapped must
    reuse the tokenizer it has.
    """
    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Encoder:
    """Turns (prompt, response) into token ids for one tokenizer and one kind of model.

    Thread-safe: it works on a copy of the tokenizer that is never changed, with the padding and truncation that some
    tokenizer files carry switched off.

    Args:
        tokenizer: A transformers tokenizer with the `tokenizers` back end (all current families have it).
        max_length: The most tokens a sequence may have, special tokens included.
        architecture: `decoder` (causal, reward at the last token) or `encoder` (reward at the first).
        policy: How sequences begin and end; without effect on encoders.

    Raises:
        ModelError: The tokenizer has no `tokenizers` back end.
        ConfigError: The policy asks for a token that the tokenizer lacks.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        architecture: Architecture,
        policy: EncodingPolicy | None = None,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                f"{type(tokenizer).__name__} has no fast tokenizer. Save the checkpoint with a tokenizer.json "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.architecture: Architecture = architecture
        self.policy = policy or EncodingPolicy()
        self._backend = _backend(backend.to_str())
        self._renderer = Renderer(tokenizer, self.policy.frame, strip_end=self.policy.eos == "on")
        self.special = SpecialTokens(tokenizer, self._backend, self._renderer, self.policy)
        ending = self._renderer.ending()
        self._ending = str(tokenizer.eos_token) if self.special.ends_in_eos and not ending else ending

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
            ConfigError: `truncation` is not a valid value.
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

        Raises:
            ConfigError: `truncation` is not a valid value.
        """
        check_choice(truncation, "truncation", Truncation)
        try:
            messages = check_messages(prompt)
        except EncodingError as error:
            return [error.about(error.param or "prompt") for _ in responses]
        outcomes: list[EncodedResponse | EncodingError | None] = [None] * len(responses)
        good = []
        for index, response in enumerate(responses):
            try:
                check_text(response, "response")
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

    def encode_text(self, text: str, truncation: Truncation = "error", *, ended: bool = False) -> EncodedResponse:
        """Encodes a text that a client has templated already.

        Special tokens that it holds are not added again, and padding tokens at its ends are left out.

        Args:
            text: The rendered conversation.
            truncation: `prompt_left` cuts from the left.
            ended: Whether a text that stops short (a generation that was cut off, or that ends without the template's
                last line break) gets the end that this model's conversations have, as OpenRLHF's server does.

        Raises:
            EncodingError: The text is unusable, or too long under this truncation.
        """
        check_choice(truncation, "truncation", Truncation)
        check_text(text, "text")
        if self.architecture == "encoder":
            encoding = self._backend.encode(text, add_special_tokens=True)
            draft = _Draft(encoding.ids, encoding.type_ids, _sequence_range(encoding, 0))
        else:
            text = self._without_padding(text, ended=ended)
            text = self._repaired(text) if ended else text
            ids, _ = self.special.put(self._backend.encode(text, add_special_tokens=False).ids, rendered_here=False)
            draft = _Draft(ids, None, range(self.special.count(ids), len(ids) - 1))
        outcome = self._fitted(draft, truncation)
        if isinstance(outcome, EncodingError):
            raise outcome
        return outcome

    def describe(self) -> EncodingInfo:
        """Returns what a manifest records of the encoding, so that a server can tell whether it reads as trained."""
        frame = self.policy.frame
        return EncodingInfo(
            architecture=self.architecture,
            template_hash=template_hash(self.chat_template) if self.chat_template else None,
            max_length=self.max_length,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            pooling="last" if self.architecture == "decoder" else "first",
            bos=self.policy.bos,
            eos=self.policy.eos,
            unread_token_ids=sorted(self.policy.unread),
            appended_token_id=self.policy.appended,
            frame=(frame.template if frame.name == "custom" else frame.name) if frame else None,
        )

    @property
    def chat_template(self) -> str | None:
        """The chat template in use, its date fixed, or None."""
        return self._renderer.chat_template if self.architecture == "decoder" else None

    def _drafts(self, messages: list[dict[str, Any]], responses: list[str]) -> list[_Draft | EncodingError]:
        if self.architecture == "encoder":
            prompt = transcript(messages)
            encodings = self._backend.encode_batch([(prompt, text) for text in responses], add_special_tokens=True)
            return [_Draft(e.ids, e.type_ids, _sequence_range(e, 0)) for e in encodings]
        rendered = self._renderer.texts(messages, responses)
        encodings = self._backend.encode_batch(
            [one.text for one in rendered], add_special_tokens=self.special.added_by_tokenizer
        )
        drafts: list[_Draft | EncodingError] = []
        for encoding, one in zip(encodings, rendered, strict=True):
            ids, moved = self.special.put(encoding.ids, rendered_here=True)
            cut = _token_range(encoding, one.start, one.end)
            start = max(cut.start + moved, self.special.count(ids))
            drafts.append(_Draft(ids, None, range(start, min(cut.stop + moved, len(ids)))))
        return drafts

    def _repaired(self, text: str) -> str:
        """Returns a client's text with this model's ending, of which it may have the first characters already."""
        known = next((n for n in range(len(self._ending), 0, -1) if text.endswith(self._ending[:n])), 0)
        return text + self._ending[known:]

    def _without_padding(self, text: str, *, ended: bool) -> str:
        """Returns a client's text without padding tokens at its ends; those that are EOS stay unless one is put."""
        pad, bos = self.tokenizer.pad_token, self.tokenizer.bos_token
        if pad and (ended or pad not in (self.tokenizer.eos_token, bos)):
            while pad != bos and text.startswith(pad):
                text = text.removeprefix(pad)
            while text.endswith(pad):
                text = text.removesuffix(pad)
        return text

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


def _token_range(encoding: Encoding, start: int, end: int) -> range:
    """Returns the tokens that lie within a range of characters, the special tokens before them excluded."""
    offsets = list(enumerate(encoding.offsets))
    first = next((index for index, (begin, stop) in offsets if stop > begin >= start), len(offsets))
    return range(first, next((index for index, (_, stop) in offsets if stop > end), len(offsets)))


def _sequence_range(encoding: Encoding, sequence: int) -> range:
    """Returns the token range of one sequence of a text pair, special tokens excluded."""
    indices = [index for index, owner in enumerate(encoding.sequence_ids) if owner == sequence]
    return range(indices[0], indices[-1] + 1) if indices else range(0)
