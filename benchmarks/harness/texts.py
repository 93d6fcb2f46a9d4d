"""Texts to score: AlpacaEval's from the folder that `MARGINRM_DATA` names, otherwise those of the demo generator.

At import this module needs the standard library only, because workers of peers run in environments without marginrm.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, TypeVar

Prompt = str | list[dict[str, str]]  # text, or the messages of a conversation
_Item = TypeVar("_Item")
_FILES = ("alpaca_eval_pairs_train", "alpaca_eval_best_of_n_test", "alpaca_eval_responses_train")
_TOKENIZER_TEXTS = 4000


@dataclass(frozen=True, slots=True)
class TextGroup:
    """A prompt with its responses."""

    prompt: Prompt
    responses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenizedGroup:
    """A prompt, its responses and their token ids as marginrm's encoder makes them.

    Attributes:
        prompt: The prompt.
        responses: Its responses.
        ids: The token ids of each sequence, prompt and special tokens included.
        type_ids: The segment ids of each sequence; None for models without them.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    type_ids: tuple[tuple[int, ...] | None, ...]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TokenizedGroup:
        """Reads the fields that `to_json` returns."""
        return cls(
            fields["prompt"],
            tuple(fields["responses"]),
            tuple(tuple(ids) for ids in fields["ids"]),
            tuple(None if ids is None else tuple(ids) for ids in fields["type_ids"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        return asdict(self)

    def only(self, indices: Sequence[int]) -> TokenizedGroup:
        """Returns the group with some of its responses."""
        return TokenizedGroup(
            self.prompt,
            tuple(self.responses[index] for index in indices),
            tuple(self.ids[index] for index in indices),
            tuple(self.type_ids[index] for index in indices),
        )

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, each with its prompt."""
        return sum(map(len, self.ids))


@dataclass(frozen=True, slots=True)
class Sample:
    """The work of one round.

    Attributes:
        groups: Prompts with their responses.
        classify: Whether a server is sent one response in a request to `/classify`; by default one group in a request.
        clients: Requests in flight, for servers.
        turns: Consecutive requests of which each waits for the reply to the one before, for servers.
    """

    groups: tuple[TokenizedGroup, ...]
    classify: bool = False
    clients: int = 1
    turns: int = 1

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Sample:
        """Reads the fields that `to_json` returns."""
        groups = tuple(TokenizedGroup.from_json(group) for group in fields.pop("groups"))
        return cls(groups, **fields)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        return asdict(self)

    @property
    def responses(self) -> int:
        """The number of responses."""
        return sum(len(group.responses) for group in self.groups)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, each with its prompt."""
        return sum(group.tokens for group in self.groups)

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """The token ids of all sequences, in order."""
        return [ids for group in self.groups for ids in group.ids]

    def subset(self, limit: int | None) -> Sample:
        """Returns at most `limit` responses, evenly spaced over all groups, so that their lengths are representative."""
        places = [(number, index) for number, group in enumerate(self.groups) for index in range(len(group.responses))]
        if limit is None or limit >= len(places):
            return self
        kept = [places[position * len(places) // limit] for position in range(limit)]
        numbers = dict.fromkeys(number for number, _ in kept)
        groups = (self.groups[number].only([index for owner, index in kept if owner == number]) for number in numbers)
        return replace(self, groups=tuple(groups), turns=1)


def shared_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    """Returns the number of leading tokens that all sequences have in common."""
    first, last = min(sequences), max(sequences)
    return next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts in a fixed random order.

    Attributes:
        source: The name of their source, for the report.
        pairs: Prompts with two responses.
        candidates: Prompts with many responses; none of these prompts is in `pairs`.
        passages: Responses, to be joined and cut to texts of a given length.
    """

    source: str
    pairs: tuple[TextGroup, ...]
    candidates: tuple[TextGroup, ...]
    passages: tuple[str, ...]

    @property
    def for_tokenizer(self) -> tuple[str, ...]:
        """The texts on which a model's tokenizer is trained."""
        return self.passages[:_TOKENIZER_TEXTS]


def load_texts(folder: Path | None = None, seed: int = 0) -> Texts:
    """Returns AlpacaEval's texts from a folder, or those of the demo generator without one.

    Raises:
        FileNotFoundError: The folder lacks a file.
    """
    texts = _demo(seed) if folder is None else _alpaca(folder)
    return Texts(
        texts.source, _shuffled(texts.pairs, seed), _shuffled(texts.candidates, seed), _shuffled(texts.passages, seed)
    )


def _shuffled(items: tuple[_Item, ...], seed: int) -> tuple[_Item, ...]:
    return tuple(Random(seed).sample(items, len(items)))


def _alpaca(folder: Path) -> Texts:
    paths = [folder / f"{name}.jsonl.gz" for name in _FILES]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{', '.join(missing)}: not found. Name the folder that holds the AlpacaEval files (docs/data.md), "
            "or none, to take texts of the demo generator: unset MARGINRM_DATA."
        )
    pairs, candidates, responses = paths
    return Texts(
        "AlpacaEval",
        tuple(TextGroup(row["prompt"], (row["chosen"], row["rejected"])) for row in _rows(pairs)),
        tuple(TextGroup(row["prompt"], tuple(c["text"] for c in row["candidates"])) for row in _rows(candidates)),
        tuple(candidate["text"] for row in _rows(responses) for candidate in row["candidates"]),
    )


def _demo(seed: int) -> Texts:
    from marginrm_training.demo.preferences import generate_groups, generate_pairs

    data = generate_pairs(seed)
    return Texts(
        "the demo generator",
        tuple(TextGroup(pair.prompt, (pair.chosen, pair.rejected)) for pair in data.train),
        tuple(TextGroup(group.prompt, group.candidates) for group in generate_groups(seed)),
        tuple(pair.chosen for pair in data.train),
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
