"""What every contender is given: a prompt, its responses, and the token ids of each as our encoder makes them.

Plain dataclasses without dependencies, since some contenders live in Python environments that lack marginrm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TextGroup:
    """A prompt with its responses.

    Attributes:
        prompt: What is asked.
        responses: Answers to it.
    """

    prompt: str
    responses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt, its responses and their token ids.

    Attributes:
        prompt: What is asked.
        responses: Answers to it.
        ids: For each response the token ids of the whole sequence, special tokens included.
        type_ids: For each response its segment ids, for encoders that use them.
    """

    prompt: str
    responses: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    type_ids: tuple[tuple[int, ...] | None, ...]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Group:
        """Reads what `to_json` made."""
        return cls(
            fields["prompt"],
            tuple(fields["responses"]),
            tuple(tuple(ids) for ids in fields["ids"]),
            tuple(None if ids is None else tuple(ids) for ids in fields["type_ids"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)

    def only(self, indices: Sequence[int]) -> Group:
        """Returns the group with some of its responses."""
        return Group(
            self.prompt,
            tuple(self.responses[index] for index in indices),
            tuple(self.ids[index] for index in indices),
            tuple(self.type_ids[index] for index in indices),
        )

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences, the prompt counted with each."""
        return sum(map(len, self.ids))


def sample(groups: Sequence[Group], limit: int | None) -> list[Group]:
    """Returns at most `limit` responses, evenly spaced over all groups, so that long and short ones are met alike."""
    places = [(number, index) for number, group in enumerate(groups) for index in range(len(group.responses))]
    if limit is None or limit >= len(places):
        return list(groups)
    kept = [places[position * len(places) // limit] for position in range(limit)]
    numbers = dict.fromkeys(number for number, _ in kept)
    return [groups[number].only([index for owner, index in kept if owner == number]) for number in numbers]
