"""Rewards of earlier requests, by the tokens that the model read. In memory, bounded, least recently used out first."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from marginrm.encoding import EncodedGroup, EncodedResponse

Position = tuple[int, int]  # index of a group, and of the member in it
PositionsByKey = Mapping[bytes, Sequence[Position]]

# Resident memory of an entry: 285 to 344 bytes were measured (CPython 3.11, 174,800 to 262,144 entries after many
# evictions). The key takes 64 of them, the reward 32, its node 48; the rest is the table, which is partly empty.
ENTRY_BYTES = 350


def key_of(response: EncodedResponse) -> bytes:
    """Returns a 16-byte digest of all that a model reads of a response.

    Either all sequences of a model have segment ids or none has, so segment ids are never taken for more token ids.
    """
    digest = blake2b(response.array.data, digest_size=16)
    if response.type_ids is not None:
        digest.update(array("i", response.type_ids))
    return digest.digest()


def positions_by_key(groups: Sequence[EncodedGroup]) -> dict[bytes, list[Position]]:
    """Returns the positions of each distinct response. Takes time: call it off the event loop."""
    positions: dict[bytes, list[Position]] = {}
    for number, group in enumerate(groups):
        for index, member in enumerate(group):
            positions.setdefault(key_of(member), []).append((number, index))
    return positions


class RewardCache:
    """The rewards of one revision of one model.

    Args:
        max_bytes: The most memory that it may take.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_entries = max_bytes // ENTRY_BYTES
        self._rewards: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rewards)

    @property
    def size(self) -> int:
        """Memory of the entries, in bytes."""
        return len(self._rewards) * ENTRY_BYTES

    def get(self, key: bytes) -> float | None:
        """Returns the reward under a key, or None."""
        reward = self._rewards.get(key)
        if reward is not None:
            self._rewards.move_to_end(key)
        return reward

    def put(self, key: bytes, reward: float) -> None:
        """Stores a finite reward. A reward that is stored already keeps its first value."""
        self._rewards.setdefault(key, reward)
        self._rewards.move_to_end(key)
        if len(self._rewards) > self._max_entries:
            self._rewards.popitem(last=False)
