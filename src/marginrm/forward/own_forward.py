"""The classifier's own forward: its rewards, whatever form its output has, and the truth for the probe at load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from marginrm.errors import HeadError
from marginrm.forward.batch import PaddedBatch

_NO_TOKEN = -1  # not None, which some configurations do not accept
# Names of the rewards in a model's output, the most telling one first; own classes have `score` or `rewards`.
_NAMES = ("score", "logits", "rewards", "end_scores")


def own_rewards(classifier: Any, batch: PaddedBatch) -> Tensor:
    """Computes rewards by a classifier's own forward.

    Args:
        classifier: Takes `input_ids` and `attention_mask`, and `token_type_ids` if the batch has them.
        batch: On the classifier's device.

    Returns:
        Float32 rewards, [responses].

    Raises:
        HeadError: It does not give exactly one value per sequence.
    """
    inputs = {} if batch.type_ids is None else {"token_type_ids": batch.type_ids}
    output = classifier(input_ids=batch.ids, attention_mask=batch.mask, **inputs)
    found = next((value for name in _NAMES if isinstance(value := getattr(output, name, None), Tensor)), None)
    values = output[0] if found is None else found
    if values.numel() != batch.rewards:
        count = values.numel() // batch.rewards
        raise HeadError(
            f"The model's head gives {count} values per sequence; a reward model gives 1 (num_labels = 1). Is this a "
            "classifier, or a checkpoint saved without its reward head?"
        )
    return values.float().reshape(batch.rewards)


def pad_token_of(classifier: PreTrainedModel) -> int | None:
    """Returns the id of a model's padding token; None if it has none, which some configurations write as -1."""
    found = getattr(classifier.config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) and found >= 0 else None


def end_token_of(classifier: PreTrainedModel) -> int | None:
    """Returns the id of a model's end token; None if it has none, several, or one outside of the vocabulary."""
    found = getattr(classifier.config.get_text_config(), "eos_token_id", None)
    known = isinstance(found, int) and 0 <= found < vocabulary_of(classifier)
    return found if known and found != pad_token_of(classifier) else None


@contextmanager
def without_padding_token(classifier: PreTrainedModel) -> Iterator[None]:
    """Makes transformers' classifiers read the last token of a lone sequence, even if it is the padding token.

    They read the last token that differs from `pad_token_id`; the encoder has decided before which token is last.
    """
    config = classifier.config.get_text_config()
    kept = config.pad_token_id
    config.pad_token_id = _NO_TOKEN
    try:
        yield
    finally:
        config.pad_token_id = kept


def vocabulary_of(classifier: PreTrainedModel) -> int:
    """Returns the number of token ids that a model knows."""
    try:
        found = getattr(classifier.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # own code whose embeddings have a name of their own
        found = None
    return int(found or classifier.config.get_text_config().vocab_size)


def is_own_code(classifier: PreTrainedModel) -> bool:
    """Says if the class came with its checkpoint (`trust_remote_code`)."""
    return type(classifier).__module__.partition(".")[0] == "transformers_modules"


def on_meta(classifier: torch.nn.Module) -> bool:
    """Says if the weights are not in memory yet."""
    return next(classifier.parameters()).is_meta
