"""One response as a model reads it: arrays of token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from marginrm.encoding.token_ids import Ids


class EncodedResponse:
    """One response, with its prompt, as a model reads it. Immutable.

    Args:
        ids: Token ids of the whole sequence, special tokens included.
        type_ids: Segment ids of the same length for encoders that use them, else None.
        truncated: Whether tokens were cut.
        read_at: Indices of the tokens that step rewards are read at; None for the one that the model reads.

    Attributes:
        array: The token ids, [tokens] int32.
        types: The segment ids, [tokens] int32, or None.
        truncated: As given.
        read_at: As given.
    """

    __slots__ = ("array", "read_at", "truncated", "types")

    def __init__(
        self,
        ids: Sequence[int] | Ids,
        type_ids: Sequence[int] | Ids | None = None,
        *,
        truncated: bool = False,
        read_at: tuple[int, ...] | None = None,
    ) -> None:
        self.array: Ids = np.asarray(ids, np.int32)
        self.types: Ids | None = None if type_ids is None else np.asarray(type_ids, np.int32)
        self.truncated = truncated
        self.read_at = read_at

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.array)

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids as a tuple, made anew: array code reads `array`."""
        return tuple(self.array.tolist())

    @property
    def type_ids(self) -> tuple[int, ...] | None:
        """The segment ids as a tuple, or None."""
        return None if self.types is None else tuple(self.types.tolist())

    @property
    def values(self) -> int:
        """How many values the model gives for it."""
        return 1 if self.read_at is None else len(self.read_at)

    def _key(self) -> tuple[object, ...]:
        return self.ids, self.type_ids, self.truncated, self.read_at

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncodedResponse) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"EncodedResponse({self.tokens} tokens, truncated={self.truncated}, read_at={self.read_at})"


EncodedGroup = Sequence[EncodedResponse]  # the responses to one prompt
