"""(prompt, response) -> token ids: the one place where training and serving agree on what a model reads.

A tokenizer with a chat template renders the conversation with it; one without gets prompt + response + EOS; an encoder
(BERT and kin) gets prompt and response as a text pair. The reward is later read at the last token of a decoder's
sequence and at the first of an encoder's, always by position, so nothing here depends on a padding token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from marginrm.encoding.client_texts import ClientTexts
from marginrm.encoding.encoded import EncodedResponse
from marginrm.encoding.fitting import Draft, common_cut, fit, sequence_range, shorten, token_range
from marginrm.encoding.frames import SEAM
from marginrm.encoding.process_steps import StepEncoder
from marginrm.encoding.rendering import RenderedText, Renderer, transcript
from marginrm.encoding.special_tokens import EncodingPolicy, SpecialTokens
from marginrm.encoding.token_ids import Ids, TokenIds
from marginrm.encoding.tokenizer_backend import backend_of
from marginrm.errors import EncodingError, InvalidTextError, SequenceTooLongError
from marginrm.manifest import EncodingInfo, template_hash
from marginrm.text import AnyTruncation, Prompt, Response, Truncation, check_choice, check_text
from marginrm.texts.messages import check_messages, read_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Architecture = Literal["decoder", "encoder"]


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
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.architecture: Architecture = architecture
        self.policy = policy or EncodingPolicy()
        frame = self.policy.frame
        apart = frame is not None and SEAM in (frame.template or "")
        self._backend = backend_of(tokenizer, seam=SEAM if apart else None)
        self._vocabulary = len(tokenizer)
        self._renderer = Renderer(tokenizer, self.policy.frame, strip_end=self.policy.eos == "on")
        self.special = SpecialTokens(tokenizer, self._backend, self._renderer, self.policy)
        self.token_ids = TokenIds(self._backend)
        self._ending = self._renderer.ending()
        self._client_texts = ClientTexts(
            tokenizer,
            self._backend,
            self._renderer,
            ends_in_eos=self.special.ends_in_eos,
            strip_end=self.policy.eos == "on",
        )
        steps = self.policy.steps
        self._steps = StepEncoder(steps, tokenizer, self._backend, self._renderer, self.special) if steps else None

    def encode(self, prompt: Prompt, response: Response, truncation: Truncation = "error") -> EncodedResponse:
        """Encodes one response to a prompt.

        Args:
            prompt: A string (one user message) or a list of `{"role", "content"}` messages ending before the response.
            response: The assistant's answer; a process reward model takes its steps as a list, too. An answer of several
                turns, with tool calls and their results, is a list of messages.
            truncation: `error` refuses what is too long; `prompt_left` cuts the prompt from its left, and never the
                response nor the end marker.

        Raises:
            EncodingError: The texts are unusable, or too long under this truncation.
            ConfigError: `truncation` is not a valid value.
        """
        outcome = self.encode_group(prompt, [response], truncation)[0]
        if isinstance(outcome, EncodingError):
            raise outcome
        return outcome

    def encode_group(
        self,
        prompt: Prompt,
        responses: Sequence[Response],
        truncation: AnyTruncation = "error",
        *,
        allow_empty: bool = False,
        most_tokens: int | None = None,
    ) -> list[EncodedResponse | EncodingError]:
        """Encodes all responses to one prompt in one tokenizer call.

        Args:
            prompt: As for `encode`.
            responses: The assistant's answers.
            truncation: As for `encode`; `prompt_left` cuts the prompt once, to what the longest response leaves, so that
                all rewards belong to one prompt. `longest_first` cuts as rerankers do: the longer of both, then both. A
                response loses its end, not its end marker; a prompt its end, before a decoder its beginning.
            allow_empty: Encode an empty response too, in place of an error.
            most_tokens: Cut the end of a response with more tokens than this.

        Returns:
            One outcome per response, in order: its encoding, or the error that makes it unusable. A bad prompt makes
            every response unusable; a bad response only itself.

        Raises:
            ConfigError: `truncation` is not a valid value.
        """
        check_choice(truncation, "truncation", AnyTruncation)
        try:
            messages = check_messages(prompt)
        except EncodingError as error:
            return [error.about(error.param or "prompt") for _ in responses]
        outcomes: list[EncodedResponse | EncodingError | None] = [None] * len(responses)
        good: dict[int, Any] = {}
        for index, response in enumerate(responses):
            try:
                empty = allow_empty and isinstance(response, str) and not response.strip()
                good[index] = response if empty else self._read_response(messages, response)
            except EncodingError as error:
                outcomes[index] = error
        try:
            texts = list(good.values())
            drafts = (
                self._steps.drafts(messages, texts)
                if self._steps
                else self._drafts(messages, texts, uncut=truncation == "error", most_tokens=most_tokens)
            )
        except EncodingError as error:
            drafts = [error.about(error.param or "prompt") for _ in good]
        drafts = [shorten(draft, most_tokens) if isinstance(draft, Draft) else draft for draft in drafts]
        cut = common_cut([draft for draft in drafts if isinstance(draft, Draft)], self.max_length, truncation)
        for index, draft in zip(good, drafts, strict=True):
            outcomes[index] = draft if isinstance(draft, EncodingError) else self._fitted(draft, truncation, cut)
        return [outcome for outcome in outcomes if outcome is not None]

    def encode_text(
        self, text: str | list[int] | tuple[int, ...], truncation: AnyTruncation = "error", *, ended: bool = False
    ) -> EncodedResponse:
        """Encodes a text that a client has templated already.

        Special tokens that it holds are not added again, padding tokens at its ends are left out, and an end marker
        gets what the template writes after it, such as a line break.

        Args:
            text: The rendered conversation, or its token ids.
            truncation: `prompt_left` cuts from the left; `longest_first` does too, and from the right for an encoder.
            ended: Whether a text that stops short, because a generation was cut off, gets the end that this model's
                conversations have, as OpenRLHF's server does. Without effect on token ids.

        Raises:
            EncodingError: The text is unusable, or too long under this truncation.
        """
        check_choice(truncation, "truncation", AnyTruncation)
        if isinstance(text, list | tuple):
            draft = self._draft_of_ids(list(text))
        else:
            check_text(text, "text")
            draft = self._draft_of_text(text, ended=ended)
        outcome = self._fitted(draft, truncation)
        if isinstance(outcome, EncodingError):
            raise outcome
        return outcome

    def encode_generation(self, prompt: Prompt, response: str) -> EncodedResponse:
        """Encodes a response as an inference engine returns it, such as slime sends it.

        Args:
            prompt: As for `encode`; or a text that this model's chat template has rendered, generation prompt included.
            response: The answer, with or without its end marker. It is empty if the model ended its turn at once.

        Raises:
            EncodingError: The texts are unusable or too long, or the prompt was rendered by another template.
        """
        if response != "":
            check_text(response, "response")
        response = self._client_texts.response(response)
        if isinstance(prompt, str) and self.architecture == "decoder":
            rendered = self._client_texts.conversation(prompt, response)
            if rendered is not None:
                return self.encode_text(rendered)
        outcome = self.encode_group(prompt, [response], allow_empty=True)[0]
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

    def _read_response(self, messages: list[dict[str, Any]], response: Any) -> str | list[Any]:
        """Returns a checked response.

        Raises:
            EncodingError: It has no usable form, or the chat template refuses its turns.
        """
        found: str | list[Any] = read_response(response, takes_steps=self._steps is not None)
        if self.architecture == "decoder" and isinstance(found, list) and self._steps is None:
            self._renderer.check_turns(messages, found)
        return found

    def _drafts(
        self, messages: list[dict[str, Any]], responses: list[Any], *, uncut: bool, most_tokens: int | None
    ) -> list[Draft | EncodingError]:
        """Encodes checked texts; where prompt and response lie is found only for what may be cut."""
        if self.architecture == "encoder" and self.policy.frame is None:
            return self._pair_drafts(transcript(messages), responses)
        rendered = self._renderer.texts(messages, responses)
        texts = [one.text for one in rendered]
        removed = self._renderer.removed(messages, responses, texts)
        encoded = self.token_ids.of(texts, special=self.special.added_by_tokenizer)
        drafts = [Draft(self.special.put(ids, rendered_here=True)[0], None) for ids in encoded]
        longest = max((len(draft.ids) for draft in drafts), default=0)
        if longest > (self.max_length if most_tokens is None else min(most_tokens, self.max_length)) and not (
            uncut and most_tokens is None
        ):
            drafts = self._located_drafts(rendered)
        return [removed.get(index, draft) for index, draft in enumerate(drafts)]

    def _pair_drafts(self, prompt: str, responses: list[Any]) -> list[Draft | EncodingError]:
        pairs = [(prompt, one if isinstance(one, str) else transcript(one)) for one in responses]
        return [
            Draft(
                np.array(one.ids, np.int32),
                np.array(one.type_ids, np.int32),
                sequence_range(one, 0),
                sequence_range(one, 1),
                keeps_prompt_end=False,
            )
            for one in self._backend.encode_batch_fast(pairs, add_special_tokens=True)
        ]

    def _located_drafts(self, rendered: list[RenderedText]) -> list[Draft]:
        """Tokenizes with offsets."""
        encodings = self._backend.encode_batch(
            [one.text for one in rendered], add_special_tokens=self.special.added_by_tokenizer
        )
        drafts = []
        for encoding, one in zip(encodings, rendered, strict=True):
            ids, moved = self.special.put(np.array(encoding.ids, np.int32), rendered_here=True)
            before = token_range(encoding, one.start, one.end)
            answer = token_range(encoding, one.end, len(one.text) - len(self._ending))
            start = max(before.start + moved, self.special.count(ids))
            drafts.append(
                Draft(
                    ids,
                    None,
                    range(start, min(before.stop + moved, len(ids))),
                    range(answer.start + moved, min(answer.stop + moved, len(ids))),
                )
            )
        return drafts

    def _draft_of_text(self, text: str, *, ended: bool) -> Draft:
        if self._steps is not None:
            return self._steps.draft_of_text(text)
        if self.architecture == "encoder":
            encoding = self._backend.encode(text, add_special_tokens=True)
            ids, types = np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32)
            return Draft(ids, types, sequence_range(encoding, 0), keeps_prompt_end=False)
        completed = self._client_texts.completed(text, ended=ended)
        return self._draft_of_ids(self.token_ids.of([completed])[0])

    def _draft_of_ids(self, sent: list[int] | Ids) -> Draft:
        """Returns the draft of a whole sequence.

        Raises:
            InvalidTextError: A value is not a token id of this model.
        """
        if isinstance(sent, list) and not (
            sent and all(type(one) is int for one in sent) and min(sent) >= 0 and max(sent) < self._vocabulary
        ):
            raise InvalidTextError(f"{{param}} must hold token ids from 0 to {self._vocabulary - 1:,}.", param="text")
        ids = np.asarray(sent, np.int32)
        if self._steps is not None:
            raise InvalidTextError(
                "{param} holds token ids, in which a process reward model cannot tell where steps end. Send text.",
                param="text",
            )
        if self.architecture == "encoder":
            return Draft(ids, np.zeros_like(ids), range(1, len(ids) - 1), keeps_prompt_end=False)
        ids, _ = self.special.put(ids, rendered_here=False)
        return Draft(ids, None, range(self.special.count(ids), len(ids) - 1))

    def _fitted(self, draft: Draft, truncation: AnyTruncation, least: int = 0) -> EncodedResponse | EncodingError:
        try:
            truncated = fit(draft, self.max_length, truncation, least)
        except SequenceTooLongError as error:
            return error
        keep_type_ids = draft.type_ids is not None and "token_type_ids" in self.tokenizer.model_input_names
        types = draft.type_ids if keep_type_ids else None
        return EncodedResponse(draft.ids, types, truncated=truncated, read_at=draft.read_at)
