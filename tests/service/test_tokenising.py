"""Tokenising of requests in a pool."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from marginrm.encoding import EncodedResponse, Encoder
from marginrm_service.engine.request import TextGroup
from marginrm_service.models.tokenising import encode
from support.models import decoder_tokenizer


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
