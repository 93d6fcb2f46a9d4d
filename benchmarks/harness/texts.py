"""Real texts to score: AlpacaEval's where `../shared/data` is there, otherwise what the demo generator makes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from benchmarks.harness.groups import TextGroup

ALPACA = Path(__file__).resolve().parents[3] / "shared" / "data"
_Item = TypeVar("_Item")
_FILES = ("alpaca_eval_pairs_train", "alpaca_eval_best_of_n_test", "alpaca_eval_responses_train")
_TOKENIZER_TEXTS = 4000


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts in a fixed random order.

    Attributes:
        source: Where they come from, for the report.
        pairs: Prompts with two responses.
        candidates: Prompts with many responses; no prompt of `pairs` is among them.
        passages: Answers, to be cut or joined to texts of a given length.
    """

    source: str
    pairs: tuple[TextGroup, ...]
    candidates: tuple[TextGroup, ...]
    passages: tuple[str, ...]

    @property
    def for_tokenizer(self) -> tuple[str, ...]:
        """What a model's tokenizer is trained on."""
        return self.passages[:_TOKENIZER_TEXTS]


def load_texts(folder: Path = ALPACA, seed: int = 0) -> Texts:
    """Returns AlpacaEval's texts from a folder, or the demo's if its files are not there."""
    paths = [folder / f"{name}.jsonl.gz" for name in _FILES]
    texts = _alpaca(*paths) if all(path.is_file() for path in paths) else _demo(seed)
    return Texts(
        texts.source, _shuffled(texts.pairs, seed), _shuffled(texts.candidates, seed), _shuffled(texts.passages, seed)
    )


def _shuffled(items: tuple[_Item, ...], seed: int) -> tuple[_Item, ...]:
    return tuple(Random(seed).sample(items, len(items)))


def _alpaca(pairs: Path, candidates: Path, responses: Path) -> Texts:
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
