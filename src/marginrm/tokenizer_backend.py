"""The `tokenizers` back end of a transformers tokenizer, as a copy that is never changed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from marginrm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Returns a copy of a tokenizer's back end, without the padding and truncation that some tokenizer files carry.

    Raises:
        ModelError: The tokenizer has no `tokenizers` back end.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            f"{type(tokenizer).__name__} has no fast tokenizer. Save the checkpoint with a tokenizer.json "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)."
        )
    return _copy(backend.to_str())


@functools.lru_cache(maxsize=4)
def _copy(serialised: str) -> Tokenizer:
    """Makes a tokenizer from the text that `to_str` wrote; equal texts share one tokenizer.

    Each thread that tokenises keeps a cache of words for each tokenizer as long as the thread lives, even after the
    tokenizer is gone (tokenizers 0.23; clearing its cache does not help). So a server whose models are swapped must
    reuse the tokenizer it has.
    """
    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
