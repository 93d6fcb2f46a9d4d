"""Rewards of earlier requests, by the tokens that the model read. In memory, bounded, least recently used out first."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from marginrm.confidence.uncertain_reward import UncertainReward
from marginrm.encoding import EncodedGroup, EncodedResponse
from marginrm.process_rewards import steps_of

Position = tuple[int, int]  # index of a group, and of the member in it
PositionsByKey = Mapping[bytes, Sequence[Position]]

# Resident memory of an entry: 285 to 344 bytes were measured (CPython 3.11, 174,800 to 262,144 entries after many
# evictions). The key takes 64 of them, the reward 32, its node 48; the rest is the table, which is partly empty.
ENTRY_BYTES = 350
STEP_BYTES = 32  # of each step reward: the number and its place in a tuple
UNCERTAINTY_BYTES = 200  # of an uncertain reward, besides 4 bytes for each of its deviations


def key_of(response: EncodedResponse) -> bytes:
    """Returns a 16-byte digest of all that a model reads of a response.

    Either all sequences of a model have segment ids or none has, so segment ids are never taken for more token ids. The
    same holds for the tokens that steps are read at, which come after -1, for no token has that id.
    """
    digest = blake2b(response.array.data, digest_size=16)
    if response.types is not None:
        digest.update(response.types.data)
    if response.read_at is not None:
        digest.update(array("i", (-1, *response.read_at)))
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
        self._max_bytes = max_bytes
        self._bytes = 0
        self._rewards: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rewards)

    @property
    def size(self) -> int:
        """Memory of the entries, in bytes."""
        return self._bytes

    def get(self, key: bytes) -> float | None:
        """Returns the reward under a key, or None."""
        reward = self._rewards.get(key)
        if reward is not None:
            self._rewards.move_to_end(key)
        return reward

    def put(self, key: bytes, reward: float) -> None:
        """Stores a finite reward. A reward that is stored already keeps its first value."""
        if key not in self._rewards:
            self._rewards[key] = reward
            self._bytes += _bytes_of(reward)
        self._rewards.move_to_end(key)
        while self._bytes > self._max_bytes:
            _, oldest = self._rewards.popitem(last=False)
            self._bytes -= _bytes_of(oldest)


def _bytes_of(reward: float) -> int:
    uncertainty = UNCERTAINTY_BYTES + 4 * len(reward.deviations) if isinstance(reward, UncertainReward) else 0
    return ENTRY_BYTES + STEP_BYTES * len(steps_of(reward) or ()) + uncertainty
