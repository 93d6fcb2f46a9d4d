"""Texts of inference engines and trainers, against the conversation that the model's own template renders."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from marginrm.encoding import Encoder
from marginrm.encoding.special_tokens import EncodingPolicy
from marginrm.errors import InvalidTextError, SequenceTooLongError
from support.models import CHATML_TEMPLATE, decoder_tokenizer, encoder_tokenizer

NO_GENERATION_PROMPT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# In the manner of Llama 2: a BOS, no special markers, the end marker behind a space.
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
# In the manner of Qwen3: the last turn of the assistant gets a block of reasoning, and a prompt may come with one.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' }}\n</think>\n\n"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# In the manner of reasoning models: the generation prompt opens the reasoning, and past reasoning is left out.
OPENS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    "no generation prompt": NO_GENERATION_PROMPT,
    "instructions": INSTRUCTIONS,
    "thinking": THINKING,
    "opens thinking": OPENS_THINKING,
}
MESSAGES = [
    {"role": "user", "content": "What is the capital?"},
    {"role": "assistant", "content": "Of France?"},
    {"role": "user", "content": "Yes, please."},
]


def encoder(template: str | None, **policy: str) -> Encoder:
    tokenizer = decoder_tokenizer(bos=template in (INSTRUCTIONS, None), chat_template=template)
    return Encoder(tokenizer, max_length=512, architecture="decoder", policy=EncodingPolicy(**policy))  # type: ignore[arg-type]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("prompt", [MESSAGES[:1], MESSAGES], ids=["one turn", "three turns"])
@pytest.mark.parametrize("ending", ["", "<|im_end|>", "<|im_end|>\n", "<|endoftext|>", "<|im_end|><pad><pad>", "</s>"])
def test_a_rendered_prompt_is_the_conversation_of_its_messages(template: str, prompt: list, ending: str) -> None:
    one = encoder(template)
    rendered = one.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    if template == NO_GENERATION_PROMPT:
        rendered += "<|im_start|>assistant\n"
    expected = one.encode(prompt, "The capital is Paris.").ids
    assert one.encode_generation(rendered, "The capital is Paris." + ending).ids == expected
    assert one.encode_generation(prompt, "The capital is Paris." + ending).ids == expected


def test_reasoning_before_the_answer_is_what_the_template_makes_of_it() -> None:
    one = encoder(THINKING)
    answer = "<think>\nA city.\n</think>\n\nParis."
    options = {"tokenize": False, "add_generation_prompt": True}
    opened = one.tokenizer.apply_chat_template(MESSAGES, **options)
    closed = one.tokenizer.apply_chat_template(MESSAGES, enable_thinking=False, **options)
    assert one.encode_generation(opened, answer + "<|im_end|>").ids == one.encode(MESSAGES, answer).ids
    assert one.encode_generation(closed, "Paris.<|im_end|>").ids == one.encode(MESSAGES, "Paris.").ids
    other = encoder(OPENS_THINKING)
    prompt = other.tokenizer.apply_chat_template(MESSAGES, **options)
    assert prompt.endswith("<think>\n")
    assert other.encode_generation(prompt, "A city.</think>Paris.").ids == other.encode(MESSAGES, "Paris.").ids


def test_a_response_that_the_template_removes_is_an_error_in_both_forms() -> None:
    one = encoder(OPENS_THINKING)
    prompt = one.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    for form in (prompt, MESSAGES):
        with pytest.raises(InvalidTextError, match="removes this whole response"):
            one.encode_generation(form, "A city.</think>")
        assert one.encode_generation(form, "").ids == one.encode_group(MESSAGES, [""], allow_empty=True)[0].ids


def test_a_rendered_system_turn_stays() -> None:
    one = encoder(CHATML_TEMPLATE)
    prompt = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    rendered = one.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert one.encode_generation(rendered, "Paris.<|im_end|>").ids == one.encode(prompt, "Paris.").ids


@pytest.mark.parametrize("template", [*TEMPLATES.values(), None], ids=[*TEMPLATES, "none"])
@pytest.mark.parametrize("prompt", ["Hi", "Write <|im_end|> once.", "Human: Hi\n\nAssistant:", "<b>Hi</b>"])
def test_a_plain_prompt_stays_a_message_of_the_user(template: str | None, prompt: str) -> None:
    one = encoder(template)
    assert one.encode_generation(prompt, "Yes.").ids == one.encode(prompt, "Yes.").ids


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\nHi<|im_end|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nI think",
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "<s>[INST] Hi [/INST]",
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>",
    ],
)
def test_a_prompt_that_another_template_rendered_is_refused(prompt: str) -> None:
    with pytest.raises(InvalidTextError, match="generation prompt of this model's chat template"):
        encoder(CHATML_TEMPLATE).encode_generation(prompt, "Hello")


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, INSTRUCTIONS, THINKING], ids=["chatml", "instructions", "think"])
@pytest.mark.parametrize("eos", ["auto", "on"])
def test_a_text_without_its_last_characters_is_completed(template: str, eos: str) -> None:
    one = encoder(template, eos=eos)
    text = one.tokenizer.apply_chat_template(
        [*MESSAGES, {"role": "assistant", "content": "The capital is Paris."}], tokenize=False
    )
    expected = one.encode(MESSAGES, "The capital is Paris.").ids
    for sent in (text, text.rstrip(), text + "\n", "<pad>" + text + "<pad>", text.removeprefix("<s>"), "<s>" + text):
        if not sent.startswith("<s>") or template == INSTRUCTIONS:
            assert one.encode_text(sent).ids == expected
            assert one.encode_text(sent, ended=True).ids == expected
    cut = text[: text.index("Paris.") + len("Paris.")]
    assert one.encode_text(cut, ended=True).ids == expected
    assert eos == "on" or one.encode_text(cut).ids != expected


def test_an_end_of_line_breaks_only_is_put_where_a_text_is_to_be_ended() -> None:
    one = encoder("{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}")
    text = "### user:\nHi\n\n### assistant:\nYes."
    assert {one.encode_text(text + end, ended=True).ids for end in ("", "\n", "\n\n")} == {one.encode("Hi", "Yes.").ids}
    assert one.encode_text(text).ids == one.encode("Hi", "Yes.").ids[: len(one.encode_text(text).ids)]


def test_a_cut_text_keeps_a_character_that_begins_the_end_marker_too() -> None:
    one = encoder(CHATML_TEMPLATE)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n1 <"
    assert one.encode_text(text, ended=True).ids == one.encode("Hi", "1 <").ids


def test_token_ids_are_read_as_their_text() -> None:
    one = encoder(INSTRUCTIONS)
    text = one.tokenizer.apply_chat_template([*MESSAGES, {"role": "assistant", "content": "Paris."}], tokenize=False)
    for added in (False, True):  # True doubles the BOS, as many clients do
        ids = one.tokenizer(text, add_special_tokens=added)["input_ids"]
        assert one.encode_text(ids).ids == one.encode(MESSAGES, "Paris.").ids
    for wrong in ([], [1, "a"], [-1], [10**6], [True]):
        with pytest.raises(InvalidTextError, match="token ids"):
            one.encode_text(wrong)


@pytest.mark.parametrize("types", [True, False])
@pytest.mark.parametrize(
    ("query", "document"),
    [("red", "word " * 90), ("word " * 90, "red"), ("one two " * 30, "three four " * 30), ("a " * 20, "b " * 14)],
)
def test_longest_first_cuts_an_encoders_pair_as_transformers_does(types: bool, query: str, document: str) -> None:
    tokenizer: PreTrainedTokenizerFast = encoder_tokenizer(token_types=types)
    for limit in (16, 17, 32):
        one = Encoder(tokenizer, max_length=limit, architecture="encoder")
        (found,) = one.encode_group(query, [document], "longest_first")
        expected = tokenizer(query, document, truncation=True, max_length=limit)
        assert list(found.ids) == expected["input_ids"]
        assert found.type_ids == (tuple(expected["token_type_ids"]) if types else None)
        assert found.truncated


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, INSTRUCTIONS, None], ids=["chatml", "instructions", "none"])
def test_longest_first_keeps_a_decoders_end_marker_and_the_start_of_the_document(template: str | None) -> None:
    whole, tokenizer = encoder(template), encoder(template).tokenizer
    short = Encoder(tokenizer, max_length=64, architecture="decoder")
    (cut,) = short.encode_group("Which bread?", ["Yeast " * 60], "longest_first")
    full = whole.encode("Which bread?", "Yeast " * 60).ids
    ending = whole.encode("Which bread?", "Yeast").ids[-1:]
    assert (len(cut.ids), cut.truncated) == (64, True)
    kept = next(index for index in range(64) if cut.ids[index] != full[index])
    assert kept > 50
    assert cut.ids[-1:] == ending
    (long_query,) = short.encode_group("Yeast " * 60, ["Bread."], "longest_first")
    assert long_query.ids[-8:] == whole.encode("Yeast " * 60, "Bread.").ids[-8:]
    with pytest.raises(SequenceTooLongError):
        short.encode("Which bread?", "Yeast " * 60, "prompt_left")


def test_an_empty_response_is_encoded_where_it_is_allowed() -> None:
    tokenizer = encoder_tokenizer()
    one = Encoder(tokenizer, max_length=64, architecture="encoder")
    (found,) = one.encode_group("Hi", [""], allow_empty=True)
    assert list(found.ids) == tokenizer([("Hi", "")])["input_ids"][0]
    chat = encoder(CHATML_TEMPLATE)
    (empty,) = chat.encode_group("Hi", [""], allow_empty=True)
    text = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}], tokenize=False
    )
    assert list(empty.ids) == chat.tokenizer(text, add_special_tokens=False)["input_ids"]
