"""Chat messages in the forms that clients and data sets write, against the form that chat templates render."""

from __future__ import annotations

from typing import Any

import pytest

from marginrm.encoding import Encoder
from marginrm.errors import EmptyTextError, InvalidTextError
from marginrm.texts.messages import normalised
from support.models import CHATML_TEMPLATE, decoder_tokenizer

USER = {"role": "user", "content": "Weather?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (USER, USER),
        ({"role": "user", "content": [{"type": "text", "text": "Wea"}, "ther?"]}, USER),
        # As the OpenAI SDK dumps a message.
        (USER | {"refusal": None, "annotations": [], "tool_calls": None, "name": None}, USER),
        ({"role": "system", "content": ""}, {"role": "system", "content": ""}),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        ({"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        (
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}],
            },
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Paris"}}}],
            },
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city'}}]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "weather", "arguments": '{"city'}}],
            },
        ),
        (
            {"role": "tool", "name": "weather", "tool_call_id": "1", "content": "sunny"},
            {"role": "tool", "name": "weather", "tool_call_id": "1", "content": "sunny"},
        ),
    ],
)
def test_every_form_of_a_message(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert normalised(message, "prompt[0]") == expected


@pytest.mark.parametrize(
    ("message", "param", "fault"),
    [
        ("hi", "prompt[0]", "must be a message"),
        ({"role": "user"}, "prompt[0]", "must be a message"),
        ({"role": 1, "content": "hi"}, "prompt[0].role", "must be a text"),
        ({"role": "user", "content": None}, "prompt[0].content", "not NoneType"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "prompt[0].content[0]", '"type": "text"'),
        (USER | {"wieght": 1}, "prompt[0]", "wieght"),
        ({"role": "assistant", "content": "", "tool_calls": "weather"}, "prompt[0].tool_calls", "list of tool calls"),
    ],
)
def test_other_forms_are_refused_by_field(message: Any, param: str, fault: str) -> None:
    with pytest.raises(InvalidTextError, match=fault) as caught:
        normalised(message, "prompt[0]")
    assert caught.value.param == param


def test_a_conversation_with_tools_is_rendered_as_transformers_renders_it() -> None:
    encoder = Encoder(decoder_tokenizer(chat_template=CHATML_TEMPLATE), max_length=256, architecture="decoder")
    prompt = [
        {"role": "system", "content": ""},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "sunny"},
    ]
    as_sent = [*prompt[:2], {"role": "assistant", "content": None, "tool_calls": [CALL]}, prompt[3]]
    whole = [*prompt, {"role": "assistant", "content": "It is sunny."}]
    expected = encoder.tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
    assert list(encoder.encode(as_sent, "It is sunny.").ids) == expected


def test_without_a_template_tool_calls_are_written_as_json() -> None:
    encoder = Encoder(decoder_tokenizer(), max_length=256, architecture="decoder")
    encoded = encoder.encode([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, USER], "Sunny.")
    text = encoder.tokenizer.decode(list(encoded.ids))
    assert 'Assistant: {"name": "weather", "arguments": {"city": "Paris"}}' in text


def test_an_empty_turn_of_the_user_is_refused() -> None:
    encoder = Encoder(decoder_tokenizer(), max_length=64, architecture="decoder")
    with pytest.raises(EmptyTextError, match=r"prompt\[0\]\.content is empty"):
        encoder.encode([{"role": "user", "content": ""}], "Yes.")


ANSWER = {"role": "assistant", "content": "Sunny."}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "weather", "content": "sunny"}
TOOL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'tool' and not m.name %}"
    "{{ raise_exception('a result needs a name') }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    "turns",
    [[ANSWER], [CALLING], [CALLING, RESULT], [CALLING, RESULT, ANSWER], [CALLING, RESULT, ANSWER | {"content": ""}]],
)
def test_a_response_in_turns_is_read_as_the_template_writes_them(turns: list[dict[str, Any]]) -> None:
    tokenizer = decoder_tokenizer(chat_template=TOOL_TEMPLATE)
    encoder = Encoder(tokenizer, max_length=512, architecture="decoder")
    expected = tokenizer.apply_chat_template([USER, *turns], return_dict=False)
    assert list(encoder.encode("Weather?", turns).ids) == expected
    together = encoder.encode_group([USER], [turns, "Rain."])
    assert list(together[0].ids) == expected  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("turns", "message", "param"),
    [
        ([RESULT, ANSWER], "must start with the assistant's turn", "response"),
        ([ANSWER, USER], "must start with the assistant's turn", "response"),
        ([CALLING, RESULT | {"name": None}], "a result needs a name", "response"),
        ([{"role": "assistant"}], "must be a message", r"response[0]"),
        ([CALLING, RESULT, ANSWER | {"content": "\ud800"}], "response", "response"),
    ],
)
def test_an_unusable_response_in_turns_is_refused_alone(turns: list[dict[str, Any]], message: str, param: str) -> None:
    encoder = Encoder(decoder_tokenizer(chat_template=TOOL_TEMPLATE), max_length=512, architecture="decoder")
    refused, usable = encoder.encode_group("Weather?", [turns, "Rain."])
    assert isinstance(refused, InvalidTextError)
    assert message in str(refused) or message == "response"
    assert refused.param == param
    assert usable == encoder.encode("Weather?", "Rain.")
