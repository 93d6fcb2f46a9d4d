"""Graded preferences with known true margins, split by prompt; the same seed gives the same bytes everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random

from marginrm.ranking import sigmoid
from marginrm_training.demo.degradations import CHANGING, CUTTING, REPLACING, Degradation
from marginrm_training.demo.texts import Text, texts

TRAIN_PAIRS = 4800
_VARIANTS = 24
_PAIRS_PER_PROMPT = 60
_SMALLEST_MARGIN = 0.5
_REPLACED, _CUT = 0.08, 0.35  # shares of the degraded answers
_MARGIN_BUCKETS = 5  # 0 to 1, 1 to 2, ... and everything from 4 on


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of known quality.

    Attributes:
        text: The answer.
        quality: Minus the sum of its degradations' severities; 0 is the good answer.
        degradations: Their names.
    """

    text: str
    quality: float
    degradations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DemoPair:
    """A preference pair with the difference in quality.

    Attributes:
        prompt: The question.
        chosen: The better answer.
        rejected: The worse answer.
        true_margin: quality(chosen) - quality(rejected).
    """

    prompt: str
    chosen: str
    rejected: str
    true_margin: float

    @property
    def strength(self) -> float:
        """P(chosen is better) of a Bradley-Terry judge of the qualities: sigmoid(true margin)."""
        return sigmoid(self.true_margin)


@dataclass(frozen=True, slots=True)
class DemoGroup:
    """Candidates for one prompt with their gold qualities."""

    prompt: str
    candidates: tuple[str, ...]
    quality: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DemoData:
    """The demo's splits; no prompt is in two of them."""

    train: tuple[DemoPair, ...]
    calibration: tuple[DemoPair, ...]
    test: tuple[DemoPair, ...]


def generate_pairs(seed: int = 0, train_pairs: int = TRAIN_PAIRS) -> DemoData:
    """Returns the demo's pairs: 80% of the prompts to train on, 8% to calibrate, 12% to test."""
    train, calibration, test = split_prompts(seed)
    return DemoData(_pairs_of(train, seed, train_pairs), _pairs_of(calibration, seed, 500), _pairs_of(test, seed, 1000))


def generate_groups(seed: int = 0, candidates: int = 16) -> list[DemoGroup]:
    """Returns Best-of-N groups on the test prompts."""
    groups = []
    test = split_prompts(seed)[2]
    for text in test:
        pool = answers_to(text, test, seed)
        chosen = Random(f"{seed}:group:{text.prompt}").sample(pool, min(candidates, len(pool)))
        groups.append(
            DemoGroup(text.prompt, tuple(answer.text for answer in chosen), tuple(answer.quality for answer in chosen))
        )
    return groups


def split_prompts(seed: int) -> tuple[list[Text], list[Text], list[Text]]:
    """Returns the entries to train on, to calibrate on and to test on."""
    order = list(texts())
    Random(f"{seed}:prompts").shuffle(order)
    test, calibration = round(0.12 * len(order)), round(0.08 * len(order))
    return order[test + calibration :], order[test : test + calibration], order[:test]


def answers_to(text: Text, split: Sequence[Text], seed: int) -> list[Answer]:
    """Returns the good answer to a prompt and degraded ones, all different.

    Texts off the subject come from the same split, so that training never sees an answer that is held out for a test.
    """
    random = Random(f"{seed}:answers:{text.prompt}")
    others = [other for other in split if other.subject != text.subject]
    found = {text.answer: Answer(text.answer, 0.0, ())}
    for _ in range(_VARIANTS * 3):
        if len(found) >= _VARIANTS:
            break
        answer = spoil(text, random.choice(others), _drawn(random), random)
        found.setdefault(answer.text, answer)
    return list(found.values())


def spoil(text: Text, other: Text, degradations: Sequence[Degradation], random: Random) -> Answer:
    """Applies degradations one after the other; their severities add up."""
    result = text.answer
    for degradation in degradations:
        result = degradation.apply(result, text, other, random)
    severity = sum(degradation.severity for degradation in degradations)
    return Answer(result, -severity, tuple(degradation.name for degradation in degradations))


def write_jsonl(pairs: Iterable[DemoPair], path: Path) -> None:
    """Writes pairs as `marginrm train` reads them, with an extra column `true_margin`."""
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            row = {
                "prompt": pair.prompt,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "strength": round(pair.strength, 6),
                "true_margin": pair.true_margin,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _drawn(random: Random) -> list[Degradation]:
    """Draws the degradations of an answer: a replacement, or up to four changes with or without a cut."""
    if random.random() < _REPLACED:
        return [random.choice(REPLACING)]
    drawn = {change.kind: change for change in random.sample(CHANGING, random.choice((1, 1, 2, 3, 4)))}
    cut = [random.choice(CUTTING)] if random.random() < _CUT else []
    return [*cut, *drawn.values()]


def _pairs_of(entries: Sequence[Text], seed: int, count: int) -> tuple[DemoPair, ...]:
    """Draws pairs in which the longer answer is right as often as the shorter one, for every size of margin."""
    buckets: dict[tuple[int, bool], list[DemoPair]] = {}
    for text in entries:
        pool = answers_to(text, entries, seed)
        random = Random(f"{seed}:pairs:{text.prompt}")
        possible = [
            (first, second)
            for first, second in combinations(pool, 2)
            if abs(first.quality - second.quality) >= _SMALLEST_MARGIN and len(first.text) != len(second.text)
        ]
        for first, second in random.sample(possible, min(4 * _PAIRS_PER_PROMPT, len(possible))):
            better, worse = (first, second) if first.quality > second.quality else (second, first)
            pair = DemoPair(text.prompt, better.text, worse.text, better.quality - worse.quality)
            longer = len(pair.chosen) > len(pair.rejected)
            buckets.setdefault((min(int(pair.true_margin), _MARGIN_BUCKETS - 1), longer), []).append(pair)
    random = Random(f"{seed}:balance:{count}")
    drawn: list[DemoPair] = []
    for margin in range(_MARGIN_BUCKETS):
        sides = [buckets.get((margin, longer), []) for longer in (True, False)]
        size = min(count // (2 * _MARGIN_BUCKETS), *map(len, sides))
        drawn += [pair for side in sides for pair in random.sample(side, size)]
    random.shuffle(drawn)
    return tuple(drawn)
