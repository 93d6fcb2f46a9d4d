"""Texts as trainers and inference engines send them -> texts as the model's own template writes them.

Such a text may hold padding tokens, end without the template's last line break, or stop short because a generation was
cut off. A prompt may be rendered already, with its generation prompt, and a response may carry its end marker. Each of
these moves the token at which a reward is read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from marginrm.encoding.rendering import Renderer
from marginrm.errors import InvalidTextError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Markers of the public chat templates: one at the start of a prompt, and one at the end of a response.
_STARTS_RENDERED = re.compile(r"\s*(<s>|<bos>|<\|\w{1,40}\|>|<｜[^｜\s]{1,40}｜>|<start_of_turn>|\[INST\])")
_END_MARKER = re.compile(r"(<\|\w{1,40}\|>|<｜[^｜\s]{1,40}｜>|<end_of_turn>|</s>|<eos>)\s*\Z")


class ClientTexts:
    """Repairs the texts of clients for one model.

    Args:
        tokenizer: Names the padding and end tokens.
        backend: Its `tokenizers` back end, to see where the tokens of the ending are.
        renderer: To see what the template prints.
        ends_in_eos: Whether an EOS is put after a text that does not end in one.
        strip_end: Whether line breaks at the end are left out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        backend: Tokenizer,
        renderer: Renderer,
        *,
        ends_in_eos: bool,
        strip_end: bool,
    ) -> None:
        self._pad, self._bos, self._eos = tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token
        self._renderer = renderer
        self._strip_end = strip_end
        self._ending = renderer.ending() or (str(self._eos) if ends_in_eos else "")
        offsets = backend.encode(self._ending, add_special_tokens=False).offsets
        self._ending_stops = sorted({stop for _, stop in offsets}, reverse=True)
        self._markers = [text for text in (self._ending.strip(), self._eos, self._pad) if text]
        self._generation_prompts = _generation_prompts(renderer)

    def completed(self, text: str, *, ended: bool) -> str:
        """Returns a rendered conversation with the end that this model's conversations have.

        Args:
            text: The client's text.
            ended: Whether a text that stops short of the end marker gets it. If not, the marker's surroundings only
                are completed, such as a line break after it.
        """
        text = self._without_padding(text, ended=ended)
        if self._strip_end:
            text = text.rstrip("\n")
        marker = self._ending.strip()
        if marker and text.rstrip().endswith(marker):
            before = self._ending[: self._ending.index(marker)]
            return text.rstrip().removesuffix(marker).removesuffix(before) + self._ending
        if not ended:
            return text
        known = next((stop for stop in self._ending_stops if text.endswith(self._ending[:stop])), 0)
        return text + self._ending[known:]

    def response(self, text: str) -> str:
        """Returns a generated response without the end marker or the padding after it."""
        kept = text
        while True:
            marker = next((one for one in self._markers if kept.rstrip().endswith(one)), None)
            found = _END_MARKER.search(kept)
            if marker is None and found is None:
                return kept
            kept = kept.rstrip().removesuffix(marker) if marker else kept[: found.start(1)] if found else kept

    def conversation(self, prompt: str, response: str) -> str | None:
        """Returns a rendered prompt and its response as one rendered conversation.

        Args:
            prompt: A text that may end with the template's generation prompt.
            response: The response without its end marker.

        Returns:
            The conversation, its last turn as the template writes it; None if the prompt is not rendered.

        Raises:
            InvalidTextError: The prompt is rendered, but not with the generation prompt of this model's template.
        """
        for ending in self._generation_prompts:
            if prompt.endswith(ending):
                return prompt.removesuffix(ending) + self._renderer.turn(response)
        if self._renderer.chat_template is not None and _STARTS_RENDERED.match(prompt):
            raise InvalidTextError(
                "The prompt starts as a rendered chat prompt, but it does not end with the generation prompt of this "
                "model's chat template. Send the prompt as messages, for slime without --apply-chat-template.",
                param="prompt",
            )
        return None

    def _without_padding(self, text: str, *, ended: bool) -> str:
        """Returns a text without padding tokens at its ends; those that are EOS stay unless one is put."""
        pad = self._pad
        if pad and (ended or pad not in (self._eos, self._bos)):
            while pad != self._bos and text.startswith(pad):
                text = text.removeprefix(pad)
            while text.endswith(pad):
                text = text.removesuffix(pad)
        return text


def _generation_prompts(renderer: Renderer) -> list[str]:
    """Returns the texts between a message of the user and a generated response, longest first.

    A template for reasoning models may open the response with `<think>`, or with empty reasoning. The template writes
    the response again in its own way, so the reward is that of the response in a list of messages.
    """
    header = renderer.header()
    if not header.strip():
        return []
    found = {header}
    unprompted = renderer.generation_prompt(add_generation_prompt=False)
    for thinking in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        ending = renderer.generation_prompt(add_generation_prompt=True, **thinking)
        if ending.strip() and (ending != unprompted or ending.strip() == header.strip()):
            found.add(ending)
    return sorted(found, key=len, reverse=True)
