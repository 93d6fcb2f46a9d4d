"""The training data of a run: one source, or several that are mixed by weight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from math import floor

from marginrm.texts.places import Stream
from marginrm.texts.preferences import PreferencePair
from marginrm_training.config import DataConfig, SourceConfig, expand
from marginrm_training.data.sources import Source, read_source

SOURCE_NAME = "source_name"  # in `PreferencePair.extra`, if a run has several sources


def read_training(config: DataConfig, seed: int) -> list[Source]:
    """Reads the training sources of a run; where there are several, each pair carries its source's name.

    Args:
        config: The data of the run.
        seed: Of the draw of a stream or of a source's `limit`.

    Raises:
        DataError: As for `read_source`.
    """
    if config.train is not None:
        stream = Stream(config.stream, seed) if config.stream else None
        return [read_source(config.train, expand(config.train), config.format, stream, config.max_bad_rows)]
    return [_read(source, config, seed) for source in config.sources]


def draw_by_weight(pairs: Sequence[PreferencePair], sources: Sequence[SourceConfig], seed: int) -> list[PreferencePair]:
    """Draws as many pairs as the weights allow without taking one twice, each source's share as its weight.

    The source that is scarcest for its weight is taken whole.

    Args:
        pairs: The pairs of all sources.
        sources: The sources; without weights, all pairs are returned.
        seed: Of the draw.
    """
    weights = {source.label: source.weight for source in sources if source.weight is not None}
    if not weights:
        return list(pairs)
    pools = {name: [pair for pair in pairs if pair.extra[SOURCE_NAME] == name] for name in weights}
    unit = min(len(pool) / weights[name] for name, pool in pools.items())
    drawn: list[PreferencePair] = []
    for name, pool in pools.items():
        count = min(len(pool), floor(unit * weights[name] + 1e-9))
        drawn += random.Random(f"{seed}:mixture:{name}").sample(pool, count)
    return drawn


def _read(given: SourceConfig, config: DataConfig, seed: int) -> Source:
    source = read_source(
        given.label,
        expand(given.path),
        given.format or config.format,
        Stream(given.stream, seed) if given.stream else None,
        config.max_bad_rows,
        given.columns,
    )
    pairs = [replace(pair, extra=pair.extra | {SOURCE_NAME: given.label}) for pair in source.pairs]
    if given.limit is not None and given.limit < len(pairs):
        pairs = random.Random(f"{seed}:limit:{given.label}").sample(pairs, given.limit)
    return replace(source, pairs=pairs)
