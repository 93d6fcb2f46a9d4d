"""A tokenizer trained on the demo's texts, and a small GPT-NeoX reward model with random weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForSequenceClassification, PreTrainedTokenizerFast

from marginrm_training.demo.recipe import DemoRecipe

END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
# The template has no date, so rewards do not change with the day.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>"
    "{% if not loop.last %}\n{% endif %}{% endfor %}{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str], recipe: DemoRecipe) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer whose padding token is not its EOS token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END, PAD, USER, ASSISTANT, "<|system|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        model_max_length=recipe.max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: DemoRecipe, seed: int) -> GPTNeoXForSequenceClassification:
    """Draws a model at random; its head with a standard deviation of 1/(hidden + 1)."""
    config = GPTNeoXConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=4 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.max_length,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.num_labels = 1
    torch.manual_seed(seed)
    model = GPTNeoXForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.normal_(0.0, 1.0 / (recipe.hidden + 1))
    return model
