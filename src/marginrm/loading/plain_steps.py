"""The token ids that end where a step is read, as the cards of process reward models make them, in plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2 import Template
from transformers import PreTrainedTokenizerBase

from marginrm.encoding.rendering import FIXED_DATE, dateless, own_template
from marginrm.process_rewards import StepReading


def plain_steps(
    tokenizer: PreTrainedTokenizerBase, steps: StepReading, prompt: Any, response: str
) -> Iterator[list[int]]:
    """Yields the token ids up to the token that each step of a response is read at.

    Args:
        tokenizer: The checkpoint's.
        steps: The form that its card documents.
        prompt: Text or messages.
        response: Cut into steps as `StepReading.split` says.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(one) for one in prompt]
    parts = steps.split(response)
    if steps.layout == "turns":
        yield from _turns(tokenizer, messages, parts)
    elif steps.layout == "pieces":
        yield from _pieces(tokenizer, steps, messages, parts)
    else:
        yield from _joined(tokenizer, steps, messages, parts)


def _joined(
    tokenizer: PreTrainedTokenizerBase, steps: StepReading, messages: list[dict[str, Any]], parts: list[str]
) -> Iterator[list[int]]:
    """Cuts the whole text behind each separator: later tokens change nothing in a causal model."""
    templated = steps.frame is None and bool(tokenizer.chat_template)
    text = "".join(part + steps.separator for part in parts)
    if templated:
        whole = _rendered(tokenizer, [*messages, {"role": "assistant", "content": text}])
    else:
        frame = steps.frame or "{{ query }}{{ document }}"
        whole = Template(frame, keep_trailing_newline=True).render(query=messages[-1]["content"], document=text)
    shown = text if text in whole else text.strip()
    start = whole.rindex(shown) - text.index(shown)
    behind = len(steps.separator) - steps.separator.rindex(steps.marker) - len(steps.marker)
    for part in parts:
        start += len(part) + len(steps.separator)
        yield list(tokenizer(whole[: start - behind], add_special_tokens=not templated)["input_ids"])


def _pieces(
    tokenizer: PreTrainedTokenizerBase, steps: StepReading, messages: list[dict[str, Any]], parts: list[str]
) -> Iterator[list[int]]:
    frame = Template(str(steps.frame), keep_trailing_newline=True)
    ids = tokenizer.encode((tokenizer.bos_token or "") + frame.render(query=messages[-1]["content"], document=""))
    for part in parts:
        ids = [*ids, *tokenizer.encode(part), tokenizer.encode(steps.separator)[-1]]
        yield ids


def _turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], parts: list[str]) -> Iterator[list[int]]:
    conversation = list(messages)
    for number, part in enumerate(parts):
        if number == 0:
            conversation[-1] = {**messages[-1], "content": f"{messages[-1]['content']} {part}"}
        else:
            conversation.append({"role": "user", "content": part})
        conversation.append({"role": "assistant", "content": "+"})
        text = _rendered(tokenizer, conversation)
        yield list(tokenizer(text[: text.rindex("+")], add_special_tokens=False)["input_ids"])


def _rendered(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]]) -> str:
    template = dateless(own_template(tokenizer) or "")
    given: dict[str, Any] = {"chat_template": template, "date_string": FIXED_DATE}
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, **given))
