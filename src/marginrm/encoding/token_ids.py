"""Texts -> token ids as arrays, without offsets: by fastokens where it gives the tokenizer's own ids, else by `tokenizers`.

Offsets are needed only to cut a sequence. Without them `tokenizers` takes 2 to 6 us for a token, which is more than all
other work on the host together; fastokens takes 0.1 to 0.5 us, and writes the ids into one buffer.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_log = logging.getLogger(__name__)
Ids = NDArray[np.int32]

# fastokens takes 0.1 s for a vocabulary of 16,000 tokens and 0.4 s for 49,000 to load: about what `tokenizers` takes for
# this many characters. So a short script never waits for it, and a long one waits once.
_LOAD_AFTER = 500_000
_CACHE_BYTES = 16 * 2**20  # of texts between added tokens, such as prompts; such a text is tokenized alone in any case
_PROBE_TOKENS = 2_000  # of the vocabulary
_PROBE_TEXTS = (
    "Hello world! It's 3 o'clock;  two  spaces,\ttabs\n\nand \r\n lines.\n",
    "naïve café Straße, ΑΒΓ, Привет мир, 你好，世界。日本語のテキスト 한국어 שלום العربية हिन्दी ไทย",
    "e\u0301 ﬁ ① ½ Ⅷ \u00a0\u200b\u200d\u2028\u0085\ufeff 👍🏽 👨‍👩‍👧 \U0001f600",
    "def f(x):\n    return x ** 2  # 1234567890 3.14e-10\n\n\n\t\tif a != b && c <= d { }",
    "   leading, trailing   ",
    " ",
    "\n",
)


class TokenIds:
    """Gives the token ids of whole texts. Thread-safe.

    Args:
        backend: The tokenizer; it is never changed.

    Attributes:
        reason: The library that tokenizes and why, in words.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._fast: Any = None
        self._characters = 0
        self._loading = threading.Lock()
        self.reason = "texts are tokenized by tokenizers"

    def of(self, texts: Sequence[str], *, special: bool = False) -> list[Ids]:
        """Returns the ids of each text.

        Args:
            texts: The texts.
            special: Whether the tokenizer adds its special tokens.
        """
        if self._fast is not None:
            try:
                return _flat(self._fast, texts, special=special)
            except ValueError as error:  # it refuses a character without a token, which `tokenizers` drops
                _log.debug("fastokens refuses a text, which tokenizers takes: %s", error)
        elif self._characters < _LOAD_AFTER:
            self._characters += sum(map(len, texts))
        else:
            self.load()
        return self._by_tokenizers(texts, special=special)

    def load(self) -> None:
        """Loads fastokens and takes it if it gives the same ids; without effect once that was tried."""
        if not self._loading.acquire(blocking=False):
            return  # never released: it is tried once
        serialised = self._backend.to_str()
        try:
            fast = _load(serialised)
            texts = [*_PROBE_TEXTS, *_vocabulary_texts(self._backend)]
            for special in (False, True):
                both = _flat(fast, texts, special=special), self._by_tokenizers(texts, special=special)
                found = zip(texts, *both, strict=True)
                differing = [text for text, fast_ids, ids in found if not np.array_equal(fast_ids, ids)]
                if differing:
                    self.reason += f"; not by fastokens, which gives other ids for {differing[0][:40]!r}"
                    return
        except (ImportError, ValueError) as error:
            self.reason += f"; not by fastokens: {str(error)[:200]}"
            return
        self._fast = fast
        self.reason = "texts are tokenized by fastokens, which gives the ids of tokenizers"

    def _by_tokenizers(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=special)
        return [np.array(encoding.ids, np.int32) for encoding in found]


@functools.lru_cache(maxsize=4)
def _load(serialised: str) -> Any:
    """Makes fastokens' tokenizer; equal texts share one, and its cache.

    Raises:
        ImportError: fastokens is not installed.
        ValueError: It does not support this tokenizer.
    """
    from fastokens import Tokenizer as FastTokenizer

    tokenizer = FastTokenizer.from_json_str(serialised)
    tokenizer.enable_segment_cache(_CACHE_BYTES)
    return tokenizer


def _flat(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[Ids]:
    buffer, offsets = tokenizer.encode_batch_flat(list(texts), add_special_tokens=special)
    ids = np.frombuffer(buffer, np.uint32).view(np.int32)
    return np.split(ids, np.frombuffer(offsets, np.uint64)[1:-1].astype(np.int64))


def _vocabulary_texts(backend: Tokenizer) -> list[str]:
    """Returns texts that hold tokens from all of the vocabulary, with and without spaces between."""
    size = backend.get_vocab_size(with_added_tokens=True)
    words = [backend.decode([at], skip_special_tokens=False) for at in range(0, size, max(size // _PROBE_TOKENS, 1))]
    return ["".join(words), " ".join(words), *(backend.decode([size - 1 - at]) for at in range(min(size, 8)))]
