"""Token ids without offsets equal those of `tokenizers`, whichever library gives them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from marginrm.encoding.token_ids import TokenIds
from support.models import encoder_tokenizer

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
PARTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from([*SPECIAL, "<|im_", "  ", "\n\n", "'ll", "hello", "\u00e9", "e\u0301", "123456"]),
)


def byte_level(kind: str) -> Tokenizer:
    """A byte-level BPE tokenizer as GPT-2's, Llama 3's or Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "gpt2"
        else pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["hello world, hello there", "the caf\u00e9 is here; it'll do", "def f(x): return 123"] * 3, trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


KINDS = ("gpt2", "llama3", "qwen")
LOADED = {kind: TokenIds(byte_level(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(st.lists(PARTS, max_size=6).map("".join), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_ids_are_those_of_tokenizers(kind: str, texts: list[str]) -> None:
    pytest.importorskip("fastokens")
    ids = LOADED[kind]
    ids.load()
    assert "by fastokens, which" in ids.reason
    for special in (False, True):
        expected = [one.ids for one in byte_level_cached(kind).encode_batch(texts, add_special_tokens=special)]
        for _ in range(2):  # the second time from the cache
            assert [one.tolist() for one in ids.of(texts, special=special)] == expected


_BACKENDS = {kind: byte_level(kind) for kind in KINDS}


def byte_level_cached(kind: str) -> Tokenizer:
    return _BACKENDS[kind]


def test_a_text_that_fastokens_refuses_is_tokenized() -> None:
    pytest.importorskip("fastokens")
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids = TokenIds(tokenizer)
    ids.load()
    assert [one.tolist() for one in ids.of(["abba", "a\u00e9b", ""])] == [
        [2, 1, 0],
        tokenizer.encode("a\u00e9b").ids,
        [],
    ]


def test_a_tokenizer_without_bpe_stays_with_tokenizers() -> None:
    backend = encoder_tokenizer().backend_tokenizer
    ids = TokenIds(backend)
    before = [one.tolist() for one in ids.of(["Hello there", ""], special=True)]
    ids.load()
    assert "not by fastokens" in ids.reason
    assert [one.tolist() for one in ids.of(["Hello there", ""], special=True)] == before
    assert before == [backend.encode(text).ids for text in ("Hello there", "")]


def test_threads_share_it() -> None:
    ids, texts = TokenIds(byte_level("llama3")), [f"hello {number} <|im_end|> world" for number in range(200)]
    ids.load()
    expected = [one.ids for one in byte_level_cached("llama3").encode_batch(texts, add_special_tokens=False)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: ids.of(texts), range(8)):
            assert [one.tolist() for one in found] == expected
