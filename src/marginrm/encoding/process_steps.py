"""(messages, steps) -> token ids for a process reward model, and the tokens that step rewards are read at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from marginrm.encoding.fitting import Draft, token_range, tokens_at
from marginrm.encoding.rendering import RenderedText, Renderer, removal
from marginrm.encoding.special_tokens import SpecialTokens
from marginrm.errors import EncodingError, InvalidTextError
from marginrm.process_rewards import VERDICT, StepReading
from marginrm.texts.messages import plain_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Private-use characters that stand for what is put in after rendering: templates trim white space, and never these.
_MARK = "\ue001\ue002"
_START = "\ue001\ue003"


@dataclass(frozen=True, slots=True)
class SteppedText:
    """A prompt and the steps of a response as one text.

    Attributes:
        rendered: The text, and the part of it that may be cut.
        marks: For each step the index of a character whose token is read; of several tokens that hold it, the last one.
    """

    rendered: RenderedText
    marks: tuple[int, ...]


class StepEncoder:
    """Encodes responses whose steps are read one by one.

    Args:
        steps: How they are read.
        tokenizer: Names the BOS token.
        backend: Its `tokenizers` back end.
        renderer: Writes conversations.
        special: Puts BOS and EOS.
    """

    def __init__(
        self,
        steps: StepReading,
        tokenizer: PreTrainedTokenizerBase,
        backend: Tokenizer,
        renderer: Renderer,
        special: SpecialTokens,
    ) -> None:
        self._steps = steps
        self._bos = str(tokenizer.bos_token or "")
        self._backend = backend
        self._renderer = renderer
        self._special = special

    def drafts(
        self, messages: list[dict[str, Any]], responses: Sequence[str | Sequence[str]]
    ) -> list[Draft | EncodingError]:
        """Encodes a prompt and the steps of each response.

        Args:
            messages: The prompt.
            responses: Checked texts, or lists of checked steps.

        Returns:
            For each response its draft; or an error where no step is left, where the template refuses these messages, or
            where it makes equal what differs.
        """
        drafts: list[Draft | EncodingError] = []
        same: dict[tuple[object, ...], set[tuple[str, ...]]] = {}
        for response in responses:
            try:
                parts = self._steps.split(response)
                drafts.append(draft := self._draft(messages, parts))
                same.setdefault((draft.ids.tobytes(), draft.read_at), set()).add(tuple(part.strip() for part in parts))
            except EncodingError as error:
                drafts.append(error)
        return [
            removal("the part in which this response differs from another one")
            if isinstance(one, Draft) and len(same[one.ids.tobytes(), one.read_at]) > 1
            else one
            for one in drafts
        ]

    def _draft(self, messages: list[dict[str, Any]], parts: list[str]) -> Draft:
        if self._steps.layout == "pieces":
            return self._pieces(messages, parts)
        one = stepped_text(self._renderer, messages, parts, self._steps)
        encoding = self._backend.encode(one.rendered.text, add_special_tokens=self._special.added_by_tokenizer)
        ids, moved = self._special.put(np.array(encoding.ids, np.int32), rendered_here=True)
        cut = token_range(encoding, one.rendered.start, one.rendered.end)
        start = max(cut.start + moved, self._special.count(ids))
        read_at = tuple(at + moved for at in tokens_at(encoding, one.marks))
        return Draft(ids, None, range(start, min(cut.stop + moved, read_at[0])), read_at=read_at)

    def draft_of_text(self, text: str) -> Draft:
        """Encodes a text that a client has rendered: it is read at each separator that it holds.

        Raises:
            InvalidTextError: It cannot be told where steps end.
        """
        marker = self._steps.marker
        if self._steps.layout != "joined" or not marker.strip() or marker not in text:
            raise InvalidTextError(
                f"{{param}}: it cannot be told where the steps of this rendered text end; this is a "
                f"{self._steps.describe()}. Send the prompt and the response to /score.",
                param="text",
            )
        found, at = [], -1
        while (at := text.find(marker, at + 1)) >= 0:
            found.append(at + len(marker) - 1)
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, moved = self._special.put(np.array(encoding.ids, np.int32), rendered_here=False)
        read_at = tuple(at + moved for at in tokens_at(encoding, found))
        return Draft(ids, None, range(self._special.count(ids), read_at[0]), read_at=read_at)

    def _pieces(self, messages: list[dict[str, Any]], parts: list[str]) -> Draft:
        """Encodes prompt, steps and separators one by one, as Skywork's `prepare_input` does."""
        prompt = self._bos + self._renderer.texts(messages, [""])[0].text
        pieces = self._backend.encode_batch(
            [prompt, self._steps.separator, *parts], add_special_tokens=self._special.added_by_tokenizer
        )
        ids, separator = list(pieces[0].ids), pieces[1].ids[-1]
        removable = range(self._special.count(np.array(ids)), len(ids))
        read_at = []
        for piece in pieces[2:]:
            ids += [*piece.ids, separator]
            read_at.append(len(ids) - 1)
        return Draft(np.array(ids, np.int32), None, removable, read_at=tuple(read_at))


def stepped_text(
    renderer: Renderer, messages: list[dict[str, Any]], parts: list[str], steps: StepReading
) -> SteppedText:
    """Writes a prompt and steps with the separators, or as the turns, that the steps are read at.

    Raises:
        InvalidTextError: The template refuses these messages, or changes the steps.
    """
    if steps.layout == "turns":
        return _turns(renderer, messages, parts)
    (rendered,) = renderer.texts(messages, [_MARK.join([*parts, ""])])
    return _marked(rendered, parts, steps.separator, steps.marker)


def _turns(renderer: Renderer, messages: list[dict[str, Any]], parts: list[str]) -> SteppedText:
    """Writes each step as a user turn, the first one behind the prompt, and answers it; read before the answer."""
    first = {**messages[-1], "content": f"{plain_text(messages[-1])} {_START}{parts[0]}"}
    turns = [*messages[:-1], first, {"role": "assistant", "content": _MARK}]
    for part in parts[1:]:
        turns += [{"role": "user", "content": part}, {"role": "assistant", "content": _MARK}]
    text = renderer.conversation(turns)
    whole = RenderedText(text.replace(_START, ""), 0, max(text.find(_START), 0))
    marked = _marked(whole, parts, VERDICT, VERDICT)
    return replace(marked, marks=tuple(mark - 1 for mark in marked.marks))


def _marked(rendered: RenderedText, parts: Sequence[str], separator: str, marker: str) -> SteppedText:
    """Puts the separator where the marks are."""
    pieces = rendered.text.split(_MARK)
    if len(pieces) != len(parts) + 1:
        raise InvalidTextError(
            "The model's chat template changes the steps of the response, so they cannot be told apart.",
            param="response",
        )
    read = separator.rindex(marker) + len(marker) - 1
    marks, length = [], 0
    for piece in pieces[:-1]:
        marks.append(length + len(piece) + read)
        length += len(piece) + len(separator)
    return SteppedText(replace(rendered, text=separator.join(pieces)), tuple(marks))
