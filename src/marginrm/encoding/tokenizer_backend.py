"""The `tokenizers` back end of a transformers tokenizer, as a copy that is never changed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, pre_tokenizers

from marginrm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def backend_of(tokenizer: PreTrainedTokenizerBase, *, seam: str | None = None) -> Tokenizer:
    """Returns a copy of a tokenizer's back end, without the padding and truncation that some tokenizer files carry.

    Args:
        tokenizer: A transformers tokenizer.
        seam: A character that is removed, and beyond which no token reaches.

    Raises:
        ModelError: The tokenizer has no `tokenizers` back end.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            f"{type(tokenizer).__name__} has no fast tokenizer. Save the checkpoint with a tokenizer.json "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)."
        )
    return _copy(backend.to_str(), seam)


@functools.lru_cache(maxsize=4)
def _copy(serialised: str, seam: str | None) -> Tokenizer:
    """Makes a tokenizer from the text that `to_str` wrote; equal texts share one tokenizer.

    Each thread that tokenises keeps a cache of words for each tokenizer as long as the thread lives, even after the
    tokenizer is gone (tokenizers 0.23; clearing its cache does not help). So a server whose models are swapped must
    reuse the tokenizer it has.
    """
    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if seam is not None:
        own = tokenizer.pre_tokenizer
        parts = pre_tokenizers.Split(seam, "removed")
        tokenizer.pre_tokenizer = parts if own is None else pre_tokenizers.Sequence([parts, own])
    return tokenizer
