"""Preference files -> encoded pairs: checked before training starts, with excluded pairs counted by reason."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from marginrm.encoding import EncodedResponse, Encoder
from marginrm.errors import DataError, EncodingError
from marginrm.manifest import DataFile
from marginrm.text import Prompt, Truncation
from marginrm.texts.preferences import PreferencePair
from marginrm_training.config import DataConfig, expand
from marginrm_training.data.excluded import ExcludedRows
from marginrm_training.data.mixture import SOURCE_NAME, draw_by_weight, read_training
from marginrm_training.data.overlap import PromptIndex, without_benchmarks
from marginrm_training.data.sources import Source, read_source
from marginrm_training.method.margins import MarginMethod

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair ready for the forward pass.

    Attributes:
        chosen: Encoding of the preferred response.
        rejected: Encoding of the other.
        label: The row's margin or strength where the method reads one, otherwise None.
        pair: The row itself, for evaluation by strength, length and the like.
    """

    chosen: EncodedResponse
    rejected: EncodedResponse
    label: float | None
    pair: PreferencePair


@dataclass(slots=True)
class Split:
    """The usable pairs of one split.

    Attributes:
        name: `train`, `calibration` or `test`.
        pairs: The pairs.
        excluded: The rows that are left out.
        truncated: Number of pairs whose prompt was cut.
    """

    name: str
    pairs: list[EncodedPair]
    excluded: ExcludedRows = field(default_factory=ExcludedRows)
    truncated: int = 0

    def summary(self) -> str:
        """Returns one line for people."""
        left_out = f"; left out: {self.excluded}" if self.excluded.sources else ""
        cut = f"; {self.truncated:,} prompts cut" if self.truncated else ""
        return f"{self.name}: {len(self.pairs):,} pairs{left_out}{cut}"


@dataclass(frozen=True, slots=True)
class Splits:
    """The pairs that a run trains, calibrates and reports on, and their files."""

    train: Split
    calibration: Split
    test: Split
    files: tuple[DataFile, ...]


def load_splits(config: DataConfig, encoder: Encoder, method: MarginMethod, seed: int) -> Splits:
    """Reads and encodes the data of a run; splits without a file are split off the training file by prompt.

    Raises:
        DataError: A file cannot be read, more rows are malformed than `data.max_bad_rows` allows, a margin is missing in
            any row or has two sources, or a split has no usable pair.
    """
    training = read_training(config, seed)
    given = {name: place for name, place in (("calibration", config.calibration), ("test", config.test)) if place}
    sources = {
        name: read_source(place, expand(place), config.format, max_bad_rows=config.max_bad_rows)
        for name, place in given.items()
    }
    parts = {name: source.pairs for name, source in sources.items()}
    parts["train"] = [pair for source in training for pair in source.pairs]
    check_margins(parts["train"], method, ignore=config.ignore_margins)
    for name, share in (("calibration", config.calibration_share), ("test", config.test_share)):
        if name not in parts:
            parts[name], parts["train"] = split_by_prompt(parts["train"], share, seed=f"{seed}:{name}")
    splits: dict[str, Split] = {}
    held_out = HeldOut(config)
    for name in ("test", "calibration", "train"):
        kept, excluded = held_out.without(parts[name])
        if name == "train":
            kept, known = without_benchmarks(kept, config.benchmarks, config.overlap_words)
            excluded.update(known)
            kept = draw_by_weight(kept, config.sources, seed)
            random.Random(f"{seed}:order").shuffle(kept)
        used = method if name == "train" else MarginMethod()
        limit = config.limit if name == "train" else None
        splits[name] = encode_pairs(name, kept, encoder, used, config.too_long, limit)
        splits[name].excluded.update(excluded)
        for source in training if name == "train" else [sources[name]] if name in sources else []:
            splits[name].excluded.update(source.excluded)
        if not splits[name].pairs:
            place = given.get(name) or ", ".join(source.name for source in training)
            raise DataError(f"{place}: no usable pairs are left. {splits[name].summary()}")
        held_out.add(kept)
    files = [_data_file(source, _pairs_of(source, splits["train"].pairs, config)) for source in training]
    files += [_data_file(source, len(splits[name].pairs)) for name, source in sources.items()]
    return Splits(splits["train"], splits["calibration"], splits["test"], tuple(files))


class HeldOut:
    """The prompts of the splits that training must not see.

    Args:
        config: Says whether overlapping prompts count as the same.
    """

    def __init__(self, config: DataConfig) -> None:
        self._keys: set[str] = set()
        self._index = PromptIndex(config.overlap_words) if config.near_duplicates == "drop" else None

    def add(self, pairs: Sequence[PreferencePair]) -> None:
        """Adds the prompts of a split."""
        self._keys |= {prompt_key(pair.prompt) for pair in pairs}
        if self._index is not None:
            self._index.add(pair.prompt for pair in pairs)

    def without(self, pairs: Sequence[PreferencePair]) -> tuple[list[PreferencePair], ExcludedRows]:
        """Returns the pairs with other prompts, and the rest as excluded rows."""
        kept, excluded = without_prompts(pairs, self._keys)
        if self._index is not None:
            kept, near = self._index.without(kept, "with a prompt close to a held-out one")
            excluded.update(near)
        return kept, excluded


def _pairs_of(source: Source, pairs: Sequence[EncodedPair], config: DataConfig) -> int:
    """Returns how many pairs of a source are used."""
    return sum(pair.pair.extra[SOURCE_NAME] == source.name for pair in pairs) if config.sources else len(pairs)


def _data_file(source: Source, pairs_used: int) -> DataFile:
    return DataFile(path=source.name, sha256=source.sha256, rows=source.rows, pairs_used=pairs_used)


def read(path: str, max_bad_rows: int | None = None) -> list[PreferencePair]:
    """Reads all pairs of a file, folder or data set. Malformed rows are left out, and logged by reason.

    Args:
        path: As for `read_source`.
        max_bad_rows: Most malformed rows; None for any number, 0 to stop at the first.

    Raises:
        DataError: The place cannot be read, more rows are malformed than allowed, or all are.
    """
    source = read_source(path, expand(path), max_bad_rows=max_bad_rows)
    if source.excluded.total:
        _log.warning("%s: left out: %s", path, source.excluded)
    return source.pairs


def check_margins(pairs: Sequence[PreferencePair], method: MarginMethod, *, ignore: bool = False) -> None:
    """Checks that every target margin has exactly one source, in every row.

    Raises:
        DataError: The method reads margins or strengths and a row has none, or rows bring margins although the method
            takes its own, which `ignore` allows.
    """
    for pair in pairs:
        _label(pair, method)
    own = method.estimator not in ("column", "none")
    conflicting = next((pair for pair in pairs if pair.margin is not None), None)
    if own and conflicting and not ignore:
        raise DataError(
            f"{conflicting.source}: this row has a 'margin', and the method takes its margins from {method.estimator!r}: "
            'use only one source of margins. Choose the preset "column", or set data.ignore_margins = true.'
        )


def without_prompts(
    pairs: Sequence[PreferencePair], held_out: AbstractSet[str]
) -> tuple[list[PreferencePair], ExcludedRows]:
    """Returns the pairs whose prompts are not held out for another split, and the others as excluded rows."""
    leaked = ExcludedRows()
    kept = []
    for pair in pairs:
        if prompt_key(pair.prompt) in held_out:
            leaked.add("with a held-out prompt", pair.source)
        else:
            kept.append(pair)
    return kept, leaked


def encode_pairs(
    name: str,
    pairs: Iterable[PreferencePair],
    encoder: Encoder,
    method: MarginMethod,
    too_long: str = "drop",
    limit: int | None = None,
) -> Split:
    """Encodes pairs, up to `limit` usable ones; excludes and counts pairs without a training signal.

    Raises:
        DataError: The method reads margins or strengths, and a row (any row, named) has none.
    """
    split = Split(name, [])
    truncation: Truncation = "prompt_left" if too_long == "prompt_left" else "error"
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for pair in pairs:
        if limit is not None and len(split.pairs) >= limit:
            break
        label = _label(pair, method)
        outcomes = encoder.encode_group(pair.prompt, [pair.chosen, pair.rejected], truncation)
        reason = _unusable(pair, outcomes, seen)
        if reason:
            split.excluded.add(reason, pair.source)
            continue
        chosen, rejected = (outcome for outcome in outcomes if isinstance(outcome, EncodedResponse))
        seen.add((chosen.ids, rejected.ids))
        split.truncated += chosen.truncated or rejected.truncated
        split.pairs.append(EncodedPair(chosen, rejected, label, pair))
    return split


def split_by_prompt(
    pairs: Sequence[PreferencePair], share: float, *, seed: str
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Splits off about this share of the prompts with all their pairs; returns the pairs split off and the rest."""
    keys = sorted({prompt_key(pair.prompt) for pair in pairs})
    random.Random(seed).shuffle(keys)
    taken = set(keys[: max(1, math.ceil(share * len(keys)))])
    off = [pair for pair in pairs if prompt_key(pair.prompt) in taken]
    rest = [pair for pair in pairs if prompt_key(pair.prompt) not in taken]
    return off, rest


def prompt_key(prompt: Prompt) -> str:
    """Returns a key that is equal for equal prompts, strings or messages."""
    return prompt if isinstance(prompt, str) else json.dumps([dict(message) for message in prompt], sort_keys=True)


def _label(pair: PreferencePair, method: MarginMethod) -> float | None:
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
        if isinstance(outcome, EncodingError):
            return outcome.reason
    chosen, rejected = (outcome for outcome in outcomes if isinstance(outcome, EncodedResponse))
    if pair.chosen == pair.rejected:
        return "with equal responses"
    if chosen.ids == rejected.ids:
        return "equal after encoding"
    if (chosen.ids, rejected.ids) in seen:
        return "duplicates"
    return None
