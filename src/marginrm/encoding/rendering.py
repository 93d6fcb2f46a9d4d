"""(messages, responses) -> the texts that a decoder reads, by its chat template, a reranker's frame, or as plain text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from marginrm.encoding.frames import Frame
from marginrm.errors import InvalidTextError, ModelError
from marginrm.texts.messages import as_turns, plain_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Answer = str | list[dict[str, Any]]  # a response as one text, or as the turns after the prompt

_REFUSED = "refused by the chat template"
_SENTINEL = "\ue000"  # a private-use character, which no response starts with
_USER = "\ue001"
_LONE_TURN = {"role": "user", "content": _USER}

# Some templates print today's date, which would make a reward depend on the day. This macro goes before them and takes
# the place of the function that they ask; the date is the one that Llama 3's own template falls back to.
FIXED_DATE = "26 Jul 2024"
_DATELESS = "{%- macro strftime_now(format) -%}" + FIXED_DATE + "{%- endmacro -%}"


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A prompt and a response as one text.

    Attributes:
        text: The text.
        start: Index of the first character of the prompt that may be cut.
        end: Index after the last one; the response starts no earlier.
    """

    text: str
    start: int
    end: int


class Renderer:
    """Writes conversations as a decoder reads them.

    Args:
        tokenizer: Its chat template is used, if it has one and the frame has no text of its own.
        frame: A reranker's text, in place of a conversation.
        strip_end: Whether line breaks at the end are left out.

    Attributes:
        chat_template: The template in use, its date fixed; None for plain text and for frames with their own text.

    Raises:
        ModelError: The tokenizer has several chat templates, and none is named `default`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, frame: Frame | None, *, strip_end: bool) -> None:
        self._tokenizer = tokenizer
        self._frame = frame
        self._strip_end = strip_end
        uses_template = bool(tokenizer.chat_template) and (frame is None or frame.template is None)
        template = own_template(tokenizer) if uses_template else None
        self.chat_template = dateless(template) if template else None

    @property
    def plain(self) -> bool:
        """Whether prompt and response are joined without a template or frame."""
        return self.chat_template is None and self._frame is None

    def texts(self, messages: list[dict[str, Any]], responses: Sequence[Answer]) -> list[RenderedText]:
        """Renders each response to one prompt.

        Raises:
            InvalidTextError: The template refuses these messages.
        """
        if self.plain:
            prompt = transcript(messages) + ("\n\nAssistant: " if len(messages) > 1 else "")
            texts = [prompt + one if isinstance(one, str) else transcript([*messages, *one]) for one in responses]
            return [RenderedText(text, 0, min(len(prompt), _common_length(text, prompt))) for text in texts]
        # Where the response starts is seen by rendering another one: a template may strip or rewrite the turns before.
        other = self._render(messages, _SENTINEL)
        if _SENTINEL not in other:
            raise InvalidTextError(
                "The model's chat template drops the last assistant turn.", param="prompt", reason=_REFUSED
            )
        start = self._query_start(messages, other) if self._frame else 0
        texts = [self._render(messages, response) for response in responses]
        return [RenderedText(text, start, _common_length(text, other)) for text in texts]

    def check_turns(self, messages: list[dict[str, Any]], turns: list[dict[str, Any]]) -> None:
        """Checks a response of several turns on its own, so that an unusable one does not refuse its neighbours.

        Raises:
            InvalidTextError: The template refuses these turns; `param` is `response`.
        """
        if self.plain:
            return
        try:
            self._render(messages, turns)
        except InvalidTextError as error:
            raise error.about("response") from error

    def removed(
        self, messages: list[dict[str, Any]], responses: Sequence[Answer], texts: Sequence[str]
    ) -> dict[int, InvalidTextError]:
        """Returns the errors, by index, of responses that a template removes, or that it makes equal to another one.

        Templates of reasoning models remove the text before `</think>`, so responses that differ only there would get
        one reward.

        Args:
            messages: The prompt.
            responses: The responses.
            texts: The same, rendered.
        """
        shortened = [index for index, text in enumerate(texts) if not _holds(text, responses[index])]
        if self.plain or not shortened:
            return {}
        same: dict[str, set[str]] = {}
        for text, response in zip(texts, responses, strict=True):
            same.setdefault(text, set()).add(response.strip() if isinstance(response, str) else json.dumps(response))
        nothing = self._without_response(messages)
        found = {}
        for index in shortened:
            if texts[index] == nothing:
                found[index] = removal("this whole response")
            elif len(same[texts[index]]) > 1:
                found[index] = removal("the part in which this response differs from another one")
        return found

    def sample(self, response: str = "a") -> str:
        """Returns a short conversation with this response; an empty text where the template refuses it."""
        try:
            return self.texts([{"role": "user", "content": "a"}], [response])[0].text
        except InvalidTextError:
            return ""

    def ending(self) -> str:
        """Returns the text that follows a response, such as the template's end marker."""
        return self.sample(_SENTINEL).rpartition(_SENTINEL)[2]

    def turn(self, response: str) -> str:
        """Returns a response as the template writes it, from the end of the user's message on.

        Raises:
            InvalidTextError: The template refuses the response, or removes all of it.
        """
        text = self._render([_LONE_TURN], response)
        for error in self.removed([_LONE_TURN], [response], [text]).values():
            raise error
        return text.partition(_USER)[2]

    def header(self) -> str:
        """Returns the text between the user's message and the response; empty without a chat template."""
        if self.chat_template is None or self._frame is not None:
            return ""
        try:
            before, response, _ = self.turn(_SENTINEL).partition(_SENTINEL)
        except InvalidTextError:
            return ""
        return before if response else ""

    def generation_prompt(self, **options: Any) -> str:
        """Returns the text after the user's message in a prompt that is rendered for generation.

        Args:
            **options: Variables of the template, such as `add_generation_prompt`.
        """
        try:
            return self.conversation([_LONE_TURN], **options).partition(_USER)[2]
        except InvalidTextError:
            return ""

    def _render(self, messages: list[dict[str, Any]], response: Answer) -> str:
        if self._frame is None:
            text = self.conversation([*messages, *as_turns(response)])
        elif not isinstance(response, str):
            raise InvalidTextError("{param} is a list of messages, and a reranker reads one text.", param="response")
        elif self._frame.template is None:
            query = {"role": "query", "content": messages[-1]["content"]}
            text = self.conversation([query, {"role": "document", "content": response}])
        else:
            text = self._frame.render(messages, response)
        return text.rstrip("\n") if self._strip_end else text

    def conversation(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Renders messages with the chat template.

        Args:
            messages: They may end with any role.
            **options: Variables of the template, such as `add_generation_prompt`.

        Raises:
            InvalidTextError: The template refuses them.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=self.chat_template, date_string=FIXED_DATE, **options
            )
        except TemplateError as error:
            raise InvalidTextError(
                f"The model's chat template refuses these messages: {str(error)[:200]}", param="prompt", reason=_REFUSED
            ) from error
        return str(text)

    def _without_response(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._render(messages, "")
        except InvalidTextError:
            return None

    def _query_start(self, messages: list[dict[str, Any]], rendered: str) -> int:
        """Returns where a frame's query starts: the instructions before it are never cut."""
        other = self._render([*messages[:-1], {"role": messages[-1]["role"], "content": _SENTINEL}], _SENTINEL)
        return _common_length(rendered, other)


def _holds(text: str, response: Answer) -> bool:
    """Tells whether a rendered text holds all of a response."""
    return all(turn["content"].strip() in text for turn in as_turns(response))


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a tokenizer's chat template: of several that have names, the one named `default`, or the only one.

    Raises:
        ModelError: There are several, and none is named `default`.
    """
    known: Any = tokenizer.chat_template
    if not isinstance(known, dict) or "default" in known:
        return tokenizer.get_chat_template()
    if len(known) > 1:
        raise ModelError(
            f"The tokenizer has the chat templates {', '.join(sorted(known))}, and none is named default. Choose one: "
            "set tokenizer.chat_template = tokenizer.chat_template[NAME], and save the tokenizer."
        )
    return str(next(iter(known.values())))


def removal(part: str) -> InvalidTextError:
    """Returns the error for a part of a response that a chat template removes."""
    return InvalidTextError(
        f"The model's chat template removes {part}, such as reasoning before </think>, so its reward would say nothing "
        "of it. Send the answer without that part, or use a template that keeps it.",
        param="response",
        reason="removed by the chat template",
    )


def dateless(template: str) -> str:
    """Returns a chat template that writes `FIXED_DATE` where it would print today's date."""
    return _DATELESS + template if prints_date(template) else template


def prints_date(template: str) -> bool:
    """Returns whether a chat template asks for today's date; `FIXED_DATE` is written in its place."""
    return "strftime_now" in template


def transcript(messages: list[dict[str, Any]]) -> str:
    """Writes a conversation as plain text: a lone message as it is, several with their roles."""
    if len(messages) == 1:
        return plain_text(messages[0])
    return "\n\n".join(f"{message['role'].capitalize()}: {plain_text(message)}" for message in messages)


def _common_length(first: str, second: str) -> int:
    """Returns how many leading characters two texts share; by bisection, because slices compare fast."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
