"""Tiny, real, random Hugging Face checkpoints, built in the test and never downloaded.

`tiny_checkpoint(tmp_path, family="llama", kv_heads=2)` writes a directory that
`AutoModelForSequenceClassification.from_pretrained` and `AutoTokenizer.from_pretrained` load: two layers, hidden size
32, one label, and a tokenizer trained on a few sentences. Same arguments, same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

SENTENCES = (
    "What is the capital of France? The capital of France is Paris.",
    "Name three primary colours. Red, yellow and blue.",
    "Why does bread rise? Yeast eats sugar and gives off gas, and the dough holds the bubbles.",
    "How do I boil an egg? Put it into boiling water for eight minutes, then cool it.",
    "Write a short poem about the sea. Grey water leans upon the shore and asks for nothing more.",
    "Translate good morning to Spanish. Buenos dias.",
    "I do not know. No. Ask somebody else, please.",
    "The quick brown fox jumps over the lazy dog. 0123456789 + - * / = ( ) [ ] { } < >",
)

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

DECODERS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForSequenceClassification),
    "llama": (LlamaConfig, LlamaForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification),
    "qwen3": (Qwen3Config, Qwen3ForSequenceClassification),
    "mistral": (MistralConfig, MistralForSequenceClassification),
}
ENCODERS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "bert": (BertConfig, BertForSequenceClassification),
    "modernbert": (ModernBertConfig, ModernBertForSequenceClassification),
}
FAMILIES = (*DECODERS, *ENCODERS)
HEADS = 4


def tiny_checkpoint(
    directory: Path | str,
    family: str = "gpt_neox",
    *,
    chat_template: str | None = None,
    bos: bool | None = None,
    pad: bool = True,
    kv_heads: int | None = None,
    max_length: int = 512,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a tiny random reward model and its tokenizer.

    Args:
        directory: Where to write; created when missing.
        family: One of `FAMILIES`.
        chat_template: A Jinja template for the tokenizer (`CHATML_TEMPLATE` for one); none by default.
        bos: Whether the tokenizer puts a BOS token first. By default only for llama and mistral, as in the wild.
        pad: Whether there is a pad token (decoders only).
        kv_heads: Key-value heads for the 4 query heads; fewer than 4 is grouped-query attention. Not for gpt_neox.
        max_length: `max_position_embeddings` and the tokenizer's `model_max_length`.
        seed: Of the weights.
        **config: Further fields of the model's config.

    Returns:
        The directory.
    """
    directory = Path(directory)
    if family in DECODERS:
        with_bos = family in ("llama", "mistral") if bos is None else bos
        tokenizer = decoder_tokenizer(bos=with_bos, pad=pad, chat_template=chat_template, max_length=max_length)
    else:
        tokenizer = encoder_tokenizer(token_types=family == "bert", max_length=max_length)
    if kv_heads is not None:
        config = {"num_key_value_heads": kv_heads} | config
    model = tiny_model(family, tokenizer, max_length=max_length, seed=seed, **config)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def tiny_model(
    family: str, tokenizer: PreTrainedTokenizerFast, *, max_length: int = 512, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """Build a random two-layer classifier with one label, in fp32, whose rewards differ visibly between texts."""
    config_class, model_class = (DECODERS | ENCODERS)[family]
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "max_position_embeddings": max_length,
        "initializer_range": 0.15,
        "num_labels": 1,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family in DECODERS and family != "gpt_neox":
        fields["num_key_value_heads"] = HEADS
    if family == "qwen3":
        fields["head_dim"] = 8
    if family == "mistral":
        fields["sliding_window"] = None
    if family == "modernbert":
        fields |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config_class(**(fields | config)))
    return model.eval()


def decoder_tokenizer(
    *, bos: bool = False, pad: bool = True, chat_template: str | None = None, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer with `<|endoftext|>` as EOS, and `<s>` as BOS when asked for."""
    backend = _byte_level_bpe()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        bos_token="<s>" if bos else None,
        pad_token="<pad>" if pad else None,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def encoder_tokenizer(*, token_types: bool = True, max_length: int = 512) -> PreTrainedTokenizerFast:
    """Build a WordPiece tokenizer that joins two texts as `[CLS] a [SEP] b [SEP]` with token types 0 and 1, as BERT.

    ModernBERT's tokenizer joins them alike, but its model has no token types: `token_types=False`.
    """
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=384, special_tokens=special, show_progress=False)
    _train(backend, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _byte_level_bpe() -> Tokenizer:
    return Tokenizer.from_str(_byte_level_json())


@cache
def _byte_level_json() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<pad>", "<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _train(backend, trainer)
    text: str = backend.to_str()
    return text


def _train(backend: Tokenizer, trainer: Any) -> None:
    train: Callable[..., None] = backend.train_from_iterator
    train(SENTENCES, trainer=trainer)
