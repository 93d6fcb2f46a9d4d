"""(prompt, response) -> token ids: one BOS, one end marker, nothing cut unless asked, and every bad text named."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from marginrm.encoding import EncodedResponse, Encoder
from marginrm.encoding.special_tokens import EncodingPolicy
from marginrm.errors import (
    ConfigError,
    EmptyTextError,
    EncodingError,
    InvalidTextError,
    ModelError,
    SequenceTooLongError,
)
from support.models import CHATML_TEMPLATE, decoder_tokenizer, encoder_tokenizer, tiny_checkpoint

MESSAGES = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Another?"},
]


def decoder(*, bos: bool = False, template: str | None = None, pad: bool = True, max_length: int = 512) -> Encoder:
    tokenizer = decoder_tokenizer(bos=bos, chat_template=template, pad=pad)
    return Encoder(tokenizer, max_length=max_length, architecture="decoder")


def text_of(encoder: Encoder, ids: tuple[int, ...]) -> str:
    return encoder.tokenizer.decode(list(ids))


def test_without_a_template_it_is_prompt_response_and_one_eos() -> None:
    encoder = decoder()
    encoded = encoder.encode("What is 1 + 1? ", "2")
    assert text_of(encoder, encoded.ids) == "What is 1 + 1? 2<|endoftext|>"
    again = encoder.encode("What is 1 + 1? ", "2<|endoftext|>")
    assert again.ids == encoded.ids


def test_a_chat_template_is_followed_to_its_end_marker() -> None:
    encoder = decoder(template=CHATML_TEMPLATE)
    encoded = encoder.encode(MESSAGES, "Blue.")
    messages = [*MESSAGES, {"role": "assistant", "content": "Blue."}]
    expected = encoder.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert list(encoded.ids) == expected
    assert text_of(encoder, encoded.ids).endswith("Blue.<|im_end|>\n")
    assert encoder.encode("Hi", "Yo").ids == encoder.encode([{"role": "user", "content": "Hi"}], "Yo").ids


@pytest.mark.parametrize("template", [None, CHATML_TEMPLATE, "{{ bos_token }}" + CHATML_TEMPLATE])
def test_there_is_exactly_one_bos_where_the_tokenizer_has_one(template: str | None) -> None:
    encoder = decoder(bos=True, template=template)
    bos = encoder.tokenizer.bos_token_id
    for ids in (encoder.encode("Hi", "Yo").ids, encoder.encode_text("<s>Hi Yo").ids, encoder.encode_text("Hi Yo").ids):
        assert ids[0] == bos
        assert ids.count(bos) == 1
    assert decoder(template=template and CHATML_TEMPLATE).encode("Hi", "Yo").ids[0] != bos


def test_an_encoder_gets_a_text_pair_with_segment_ids() -> None:
    tokenizer = encoder_tokenizer()
    encoder = Encoder(tokenizer, max_length=64, architecture="encoder")
    encoded = encoder.encode("red yellow", "blue")
    expected = tokenizer("red yellow", "blue")
    assert list(encoded.ids) == expected["input_ids"]
    assert list(encoded.type_ids or ()) == expected["token_type_ids"]


def test_padding_and_truncation_in_the_tokenizer_file_have_no_effect() -> None:
    tokenizer = encoder_tokenizer()
    plain = Encoder(tokenizer, max_length=64, architecture="encoder").encode("red " * 20, "blue")
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=32)
    assert Encoder(tokenizer, max_length=64, architecture="encoder").encode("red " * 20, "blue") == plain


def test_what_is_too_long_is_an_error_that_names_tokens_and_limit() -> None:
    encoder = decoder(max_length=16)
    with pytest.raises(SequenceTooLongError, match=r"\d+ tokens; this model takes 16") as caught:
        encoder.encode("one two three four five six seven eight nine ten", "yes")
    assert caught.value.limit == 16
    assert caught.value.tokens > 16


@pytest.mark.parametrize("template", [None, CHATML_TEMPLATE])
@pytest.mark.parametrize("bos", [False, True])
def test_on_request_the_prompt_is_cut_from_the_left_and_only_the_prompt(template: str | None, bos: bool) -> None:
    response = "blue and green"
    full = decoder(bos=bos, template=template).encode("start " + "word " * 60, response)
    limit = len(full.ids) - 30
    cut = decoder(bos=bos, template=template, max_length=limit).encode("start " + "word " * 60, response, "prompt_left")
    assert cut.truncated
    assert len(cut.ids) == limit
    assert cut.ids[int(bos) :] == full.ids[int(bos) + 30 :]
    assert cut.ids[0] == full.ids[0] if bos else True


def test_the_prompt_of_a_text_pair_is_cut_from_the_left() -> None:
    tokenizer = encoder_tokenizer()
    encoder = Encoder(tokenizer, max_length=16, architecture="encoder")
    cut = encoder.encode("red " * 40 + "yellow", "blue", "prompt_left")
    whole = Encoder(tokenizer, max_length=512, architecture="encoder").encode("red " * 40 + "yellow", "blue")
    assert cut.truncated
    assert cut.ids[0] == whole.ids[0]
    assert cut.ids[1:] == whole.ids[-15:]
    assert cut.type_ids is not None
    assert len(cut.type_ids) == len(cut.ids)


def test_a_response_over_the_limit_is_never_cut() -> None:
    with pytest.raises(SequenceTooLongError, match="never cut") as caught:
        decoder(max_length=16).encode("hi", "word " * 40, "prompt_left")
    assert caught.value.param == "response"


@pytest.mark.parametrize(
    ("prompt", "response", "error", "param"),
    [
        ("hi", "", EmptyTextError, "response"),
        ("hi", " \n", EmptyTextError, "response"),
        ("", "yo", EmptyTextError, "prompt"),
        ([], "yo", EmptyTextError, "prompt"),
        ("hi", 3, InvalidTextError, "response"),
        (None, "yo", InvalidTextError, "prompt"),
        ("hi", "a\ud800b", InvalidTextError, "response"),
        (["hi"], "yo", InvalidTextError, "prompt[0]"),
        ([{"role": "user"}], "yo", InvalidTextError, "prompt[0]"),
        ([{"role": "user", "content": 1}], "yo", InvalidTextError, "prompt[0].content"),
        ([*MESSAGES, {"role": "assistant", "content": "x"}], "yo", InvalidTextError, "prompt[3].role"),
    ],
)
def test_every_bad_text_is_refused_by_name(
    prompt: object, response: object, error: type[EncodingError], param: str
) -> None:
    with pytest.raises(error) as caught:
        decoder().encode(prompt, response)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_a_bad_response_does_not_spoil_its_neighbours() -> None:
    encoder = decoder()
    outcomes = encoder.encode_group("hi", ["yo", "", "there"])
    assert outcomes[0] == encoder.encode("hi", "yo")
    assert isinstance(outcomes[1], EmptyTextError)
    assert outcomes[2] == encoder.encode("hi", "there")


def test_a_template_that_prints_the_date_prints_the_same_one_every_day() -> None:
    encoder = decoder(template="{{ strftime_now('%d %b %Y') }}\n" + CHATML_TEMPLATE)
    assert text_of(encoder, encoder.encode("hi", "yo").ids).startswith("26 Jul 2024")


def test_a_template_that_refuses_the_roles_gives_a_clear_error() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(InvalidTextError, match="no system role"):
        decoder(template=template + CHATML_TEMPLATE).encode([{"role": "system", "content": "x"}, MESSAGES[0]], "yo")


def test_a_template_that_drops_the_answer_is_refused() -> None:
    with pytest.raises(InvalidTextError, match="drops the last assistant turn"):
        decoder(template="{{ messages[0]['content'] }}").encode("hi", "yo")


@pytest.mark.parametrize("pad", [True, False])
def test_a_saved_tokenizer_encodes_as_the_one_in_memory(tmp_path: Path, pad: bool) -> None:
    path = tiny_checkpoint(tmp_path, "llama", chat_template=CHATML_TEMPLATE, pad=pad)
    loaded = Encoder(AutoTokenizer.from_pretrained(path), max_length=512, architecture="decoder")
    assert loaded.encode("hi", "yo") == decoder(bos=True, template=CHATML_TEMPLATE, pad=pad).encode("hi", "yo")
    assert loaded.describe().template_hash is not None


@pytest.mark.parametrize("template", [None, CHATML_TEMPLATE])
def test_the_prompt_is_cut_once_for_all_responses(template: str | None) -> None:
    prompt = " ".join(f"word{index}" for index in range(40))
    responses = ["yes", "no " * 10, "no " * 300]
    whole = decoder(template=template).encode_group(prompt, responses[:2])
    limit = len(whole[1].ids) - 15  # type: ignore[union-attr]
    encoder = decoder(template=template, max_length=limit)
    short, long, hopeless = encoder.encode_group(prompt, responses, "prompt_left")
    assert isinstance(hopeless, SequenceTooLongError)
    assert isinstance(short, EncodedResponse)
    assert isinstance(long, EncodedResponse)
    assert len(long.ids) == limit
    assert short.truncated
    prompts = [text_of(encoder, one.ids).partition(answer)[0] for one, answer in ((short, "yes"), (long, "no no"))]
    assert prompts[0] == prompts[1]
    # Alone, the short response keeps as much of the prompt as fits.
    assert len(encoder.encode(prompt, "yes", "prompt_left").ids) == min(limit, len(whole[0].ids))  # type: ignore[union-attr]


def test_the_prompt_of_a_text_pair_is_cut_once_too() -> None:
    encoder = Encoder(encoder_tokenizer(), max_length=16, architecture="encoder")
    short, long = encoder.encode_group("red yellow " * 8, ["blue", "blue " * 6], "prompt_left")
    assert isinstance(short, EncodedResponse)
    assert isinstance(long, EncodedResponse)
    assert short.ids[: len(short.ids) - 2] == long.ids[: len(short.ids) - 2]


REASONING = CHATML_TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]").replace(
    "message['content']", "message['content'].split('</think>')[-1]"
)


def test_responses_that_the_template_makes_equal_are_refused_and_their_neighbours_kept() -> None:
    assert REASONING != CHATML_TEMPLATE
    encoder = decoder(template=REASONING)
    responses = ["<think>a</think>four", "<think>b</think>four", "four", "<think>c</think>five", "<think>d</think>"]
    one, two, plain, other, nothing = encoder.encode_group("2 + 2?", responses)
    for removed in (one, two, nothing):
        assert isinstance(removed, InvalidTextError)
        assert (removed.reason, removed.param) == ("removed by the chat template", "response")
    assert "removes the part in which this response differs from another one" in str(one)
    assert "removes this whole response" in str(nothing)
    assert plain == encoder.encode("2 + 2?", "four")
    assert other == encoder.encode("2 + 2?", "five")
    # Alone, or beside the same response again, it is read as the template has it.
    assert encoder.encode_group("2 + 2?", responses[:1] * 2) == [plain, plain]


def test_white_space_that_a_template_trims_is_not_a_difference() -> None:
    encoder = decoder(template=CHATML_TEMPLATE.replace("['content']", "['content'] | trim"))
    one, two = encoder.encode_group("2 + 2?", ["four", "four\n"])
    assert one == two
    assert isinstance(one, EncodedResponse)


def test_of_named_templates_the_default_one_is_used() -> None:
    tokenizer = decoder_tokenizer(chat_template=None)
    plain = decoder(template=CHATML_TEMPLATE).encode("Hi", "Yo")
    for templates in ({"default": CHATML_TEMPLATE, "rag": "{{ messages }}"}, {"main": CHATML_TEMPLATE}):
        tokenizer.chat_template = templates
        assert Encoder(tokenizer, max_length=64, architecture="decoder").encode("Hi", "Yo") == plain
    tokenizer.chat_template = {"rag": "{{ messages }}", "tool_use": CHATML_TEMPLATE}
    with pytest.raises(ModelError, match="the chat templates rag, tool_use, and none is named default"):
        Encoder(tokenizer, max_length=64, architecture="decoder")


def test_the_reason_of_a_refused_prompt_is_the_template() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    messages = [{"role": "system", "content": "x"}, MESSAGES[0]]
    refused, _ = decoder(template=template + CHATML_TEMPLATE).encode_group(messages, ["yo", "ya"])
    assert isinstance(refused, InvalidTextError)
    assert refused.reason == "refused by the chat template"


def policed(template: str | None, **policy: object) -> Encoder:
    tokenizer = decoder_tokenizer(bos=True, chat_template=template)
    return Encoder(
        tokenizer,
        max_length=64,
        architecture="decoder",
        policy=EncodingPolicy(**({"bos": "auto"} | policy)),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("template", "bos", "count"),
    [
        (CHATML_TEMPLATE, "auto", 0),
        ("{{ bos_token }}" + CHATML_TEMPLATE, "auto", 1),
        (None, "auto", 1),
        (CHATML_TEMPLATE, "single", 1),
        (CHATML_TEMPLATE, "on", 1),
        ("{{ bos_token }}" + CHATML_TEMPLATE, "off", 0),
        ("{{ bos_token }}" + CHATML_TEMPLATE, "double", 2),
    ],
)
def test_bos_is_as_the_policy_says_in_conversations_and_in_client_texts(
    template: str | None, bos: str, count: int
) -> None:
    encoder = policed(template, bos=bos)
    bos_id = encoder.tokenizer.bos_token_id
    conversation = encoder.encode("Hi", "Yo")
    assert conversation.ids[: count + 1].count(bos_id) == count
    rendered = encoder.tokenizer.decode(list(conversation.ids))
    for text in (rendered, rendered.removeprefix("<s>")):  # verl strips the BOS before it sends a text
        assert encoder.encode_text(text).ids == conversation.ids


@pytest.mark.parametrize(
    ("template", "eos", "end"),
    [
        (None, "auto", "Yo<|endoftext|>"),
        (None, "off", "Yo"),
        (CHATML_TEMPLATE, "auto", "Yo<|im_end|>\n"),
        (CHATML_TEMPLATE, "on", "Yo<|im_end|><|endoftext|>"),
    ],
)
def test_eos_is_as_the_policy_says(template: str | None, eos: str, end: str) -> None:
    encoder = policed(template, eos=eos)
    assert text_of(encoder, encoder.encode("Hi", "Yo").ids).endswith(end)


def test_padding_that_is_not_read_is_left_out_at_the_end_only() -> None:
    tokenizer = decoder_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    policy = EncodingPolicy("auto", unread=frozenset({end}))
    encoder = Encoder(tokenizer, max_length=64, architecture="decoder", policy=policy)
    assert text_of(encoder, encoder.encode("Hi", "Yo").ids) == "Hi<|im_end|>Yo"


def test_a_reward_token_is_put_at_the_end_once() -> None:
    encoder = policed(CHATML_TEMPLATE, appended=1)
    ids = encoder.encode("Hi", "Yo").ids
    assert ids[-1] == 1
    assert ids[-2] != 1
    assert encoder.encode_text("Hi Yo<pad>").ids[-2:].count(1) == 1


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_token_that_the_tokenizer_lacks_cannot_be_asked_for(name: str) -> None:
    tokenizer = decoder_tokenizer(chat_template=CHATML_TEMPLATE)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=f"{name} = on: this checkpoint's tokenizer has no {name.upper()} token"):
        Encoder(tokenizer, max_length=64, architecture="decoder", policy=EncodingPolicy(**{name: "on"}))  # type: ignore[arg-type]
