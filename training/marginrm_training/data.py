"""Preference files -> encoded pairs: checked before a step is taken, and every pair left out is counted by its reason."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from marginrm.encoding import EncodedResponse, Encoder, Prompt, Truncation
from marginrm.errors import DataError, EncodingError, SequenceTooLongError
from marginrm.manifest import DataFile
from marginrm.preferences import PreferencePair, read_pairs
from marginrm_training.config import DataConfig, expand
from marginrm_training.margins import MarginMethod


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair ready for the forward pass.

    Attributes:
        chosen: Encoding of the preferred response.
        rejected: Encoding of the other.
        given: The row's margin or strength where the method reads one, else None.
        pair: The row itself, for evaluation by strength, length and the like.
    """

    chosen: EncodedResponse
    rejected: EncodedResponse
    given: float | None
    pair: PreferencePair


@dataclass(slots=True)
class Split:
    """The usable pairs of one split.

    Attributes:
        name: `train`, `calibration` or `test`.
        pairs: The pairs.
        dropped: How many rows were left out, by reason.
        truncated: How many pairs had their prompt cut.
    """

    name: str
    pairs: list[EncodedPair]
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0

    def summary(self) -> str:
        """Returns one line for people."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        cut = f"; {self.truncated:,} prompts cut" if self.truncated else ""
        return f"{self.name}: {len(self.pairs):,} pairs" + (f"; left out: {reasons}" if reasons else "") + cut


@dataclass(frozen=True, slots=True)
class Splits:
    """What a run trains, calibrates and reports on, and the files it came from."""

    train: Split
    calibration: Split
    test: Split
    files: tuple[DataFile, ...]


def load_splits(config: DataConfig, encoder: Encoder, method: MarginMethod, seed: int) -> Splits:
    """Reads and encodes the data of a run; splits by prompt what has no file of its own.

    Raises:
        DataError: A file cannot be read, a row is malformed, a margin is missing in any row, or nothing is left.
    """
    rows = read(config.train)
    parts = {"train": rows}
    for name, path, share in (
        ("calibration", config.calibration, config.calibration_share),
        ("test", config.test, config.test_share),
    ):
        if path:
            parts[name] = read(path)
        else:
            parts[name], parts["train"] = split_by_prompt(parts["train"], share, seed=f"{seed}:{name}")
    leaked = Counter[str]()
    held_out = {prompt_key(pair.prompt) for name in ("calibration", "test") for pair in parts[name]}
    kept = [pair for pair in parts["train"] if prompt_key(pair.prompt) not in held_out]
    leaked["prompts that are also held out"] = len(parts["train"]) - len(kept)
    random.Random(f"{seed}:order").shuffle(kept)
    train = encode_pairs("train", kept, encoder, method, config.too_long, limit=config.limit)
    train.dropped += leaked
    others = {
        name: encode_pairs(name, parts[name], encoder, MarginMethod(), config.too_long)
        for name in ("calibration", "test")
    }
    for split in (train, *others.values()):
        if not split.pairs:
            raise DataError(f"{config.train}: no usable pairs for {split.name}. {split.summary()}")
    used = {config.train: train, config.calibration: others["calibration"], config.test: others["test"]}
    files = tuple(data_file(path, len(split.pairs)) for path, split in used.items() if path)
    return Splits(train, others["calibration"], others["test"], files)


def read(path: str) -> list[PreferencePair]:
    """Reads all pairs of a file; a malformed row stops with its path:line."""
    return list(read_pairs(Path(expand(path))))


def encode_pairs(
    name: str,
    pairs: Iterable[PreferencePair],
    encoder: Encoder,
    method: MarginMethod,
    too_long: str = "drop",
    limit: int | None = None,
) -> Split:
    """Encodes pairs, up to `limit` usable ones, and leaves out, counted, those that teach nothing.

    Raises:
        DataError: The method reads margins or strengths, and a row (any row, named) has none.
    """
    split = Split(name, [])
    truncation: Truncation = "prompt_left" if too_long == "prompt_left" else "error"
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for pair in pairs:
        if limit is not None and len(split.pairs) >= limit:
            break
        given = _given(pair, method)
        outcomes = encoder.encode_group(pair.prompt, [pair.chosen, pair.rejected], truncation)
        reason = _unusable(pair, outcomes, seen)
        if reason:
            split.dropped[reason] += 1
            continue
        chosen, rejected = (outcome for outcome in outcomes if isinstance(outcome, EncodedResponse))
        seen.add((chosen.ids, rejected.ids))
        split.truncated += chosen.truncated or rejected.truncated
        split.pairs.append(EncodedPair(chosen, rejected, given, pair))
    return split


def split_by_prompt(
    pairs: Sequence[PreferencePair], share: float, *, seed: str
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Splits off about this share of the prompts, with all their pairs; returns what was split off and the rest."""
    keys = sorted({prompt_key(pair.prompt) for pair in pairs})
    random.Random(seed).shuffle(keys)
    taken = set(keys[: max(1, math.ceil(share * len(keys)))])
    off = [pair for pair in pairs if prompt_key(pair.prompt) in taken]
    rest = [pair for pair in pairs if prompt_key(pair.prompt) not in taken]
    return off, rest


def prompt_key(prompt: Prompt) -> str:
    """Returns a text that is equal for equal prompts, strings or messages."""
    return prompt if isinstance(prompt, str) else json.dumps([dict(message) for message in prompt], sort_keys=True)


def data_file(path: str, used: int) -> DataFile:
    """Returns what the manifest records of a file."""
    digest = hashlib.sha256()
    with Path(expand(path)).open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    rows = sum(1 for _ in read_pairs(Path(expand(path))))
    return DataFile(path=path, sha256=digest.hexdigest(), rows=rows, pairs_used=used)


def _given(pair: PreferencePair, method: MarginMethod) -> float | None:
    if method.estimator not in ("column", "strength"):
        return None
    name = "margin" if method.estimator == "column" else "strength"
    value: float | None = getattr(pair, name)
    if value is None:
        raise DataError(
            f"{pair.source}: this row has no {name!r}, which the method reads from every row. Add it, or choose a "
            "preset that estimates its margins (`margin`, `paper`) or uses none (`bt`)."
        )
    return value


def _unusable(
    pair: PreferencePair,
    outcomes: Sequence[EncodedResponse | EncodingError],
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]],
) -> str | None:
    for outcome in outcomes:
        if isinstance(outcome, SequenceTooLongError):
            return "too long"
        if isinstance(outcome, EncodingError):
            return outcome.code.replace("_", " ")
    chosen, rejected = (outcome for outcome in outcomes if isinstance(outcome, EncodedResponse))
    if pair.chosen == pair.rejected:
        return "with equal responses"
    if chosen.ids == rejected.ids:
        return "equal after encoding"
    if (chosen.ids, rejected.ids) in seen:
        return "duplicates"
    return None
