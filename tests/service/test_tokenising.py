"""Tokenising of requests in a pool."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from marginrm.encoding import EncodedResponse, Encoder
from marginrm_service.engine.request import TextGroup
from marginrm_service.models.tokenising import encode
from support.models import decoder_tokenizer

# As templates of reasoning models: what comes before </think> is removed.
REASONING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
)


def test_a_large_group_has_one_prompt_when_it_is_cut() -> None:
    encoder = Encoder(decoder_tokenizer(), max_length=40, architecture="decoder")
    prompt = " ".join(f"word{index}" for index in range(30))
    group = TextGroup(prompt, ["no " * (1 + index // 10) for index in range(150)])
    with ThreadPoolExecutor(2) as pool:
        found = asyncio.run(encode(encoder, [group, TextGroup("Hi ", ["yes"])], "prompt_left", pool))
    assert [len(one) for one in found] == [150, 1]
    starts = set()
    for one, response in zip(found[0], group.responses, strict=True):
        assert isinstance(one, EncodedResponse)
        assert one.truncated
        starts.add(encoder.tokenizer.decode(list(one.ids)).removesuffix("<|endoftext|>").removesuffix(response))
    assert len(starts) == 1


def test_what_a_template_removes_is_noticed_across_the_parts_of_a_group() -> None:
    encoder = Encoder(decoder_tokenizer(chat_template=REASONING_TEMPLATE), max_length=256, architecture="decoder")
    responses = [f"<think>{index}</think>answer {index}" for index in range(150)]
    responses[3], responses[140] = "<think>a bad plan</think>Paris", "<think>a good plan</think>Paris"
    responses[5] = responses[141] = "<think>equal</think>London"
    with ThreadPoolExecutor(2) as pool:
        (found,) = asyncio.run(encode(encoder, [TextGroup("Hi", responses)], "error", pool))
    errors = {index for index, one in enumerate(found) if not isinstance(one, EncodedResponse)}
    assert errors == {3, 140}
    assert all("removes the part in which this response differs" in str(found[index]) for index in errors)
