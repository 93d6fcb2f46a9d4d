"""A checkpoint and a file -> metrics, shared by `evaluate`, `compare`, `calibrate` and ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from marginrm.calibration import Floats
from marginrm.errors import DataError
from marginrm.reading import ReadingOptions
from marginrm.reward_model import RewardModel
from marginrm_training.config import expand
from marginrm_training.data.formats import Form
from marginrm_training.data.sources import read_source
from marginrm_training.data.splits import EncodedPair, Split, encode_pairs
from marginrm_training.evaluation.bootstrap import evaluation_intervals
from marginrm_training.evaluation.comparison import common, compare, compare_picks
from marginrm_training.evaluation.groups import ScoredGroups, load_groups, score_groups
from marginrm_training.evaluation.pairs import PairRewards, evaluate, score_pairs
from marginrm_training.method.margins import MarginMethod


@dataclass(frozen=True, slots=True)
class MeasuredPairs:
    """A checkpoint's measures on preference pairs.

    Attributes:
        split: The usable pairs, and the rows that are excluded.
        rewards: The checkpoint's rewards.
        temperature: T of its confidence.
        metrics: Metrics by name, as `evaluate` returns them.
    """

    split: Split
    rewards: PairRewards
    temperature: float
    metrics: dict[str, float]

    @property
    def unusable(self) -> int:
        """Number of rows that were left out: malformed, too long, equal, or duplicates."""
        return self.split.excluded.total

    def intervals(self) -> dict[str, float]:
        """Returns `NAME_low` and `NAME_high` of the main metrics, the ends of 95% bootstrap intervals over pairs."""
        return evaluation_intervals(self.rewards.d, self.temperature)


@dataclass(frozen=True, slots=True)
class MeasuredDifference:
    """Two checkpoints' measures on the same pairs, the same candidates, or both; a part without data is empty.

    Attributes:
        metrics: As `compare` and `compare_picks` return them.
        pairs: The pairs that both checkpoints can read.
        margins: Both checkpoints' margins of these pairs, each [pairs].
        groups: Both checkpoints' rewards of the candidates.
        notes: One line for people on each file and checkpoint.
    """

    metrics: dict[str, float]
    pairs: Sequence[EncodedPair]
    margins: tuple[Floats, Floats] | None
    groups: tuple[ScoredGroups, ScoredGroups] | None
    notes: Sequence[str]


def measure_pairs(
    model: RewardModel,
    data: str,
    *,
    form: Form = "pairs",
    too_long: str = "drop",
    limit: int | None = None,
    max_bad_rows: int | None = None,
    progress: bool = True,
) -> MeasuredPairs:
    """Measures a checkpoint on preference pairs. Arguments and errors as for `usable_pairs`.

    Args:
        model: The checkpoint.
        data: The file, folder or data set.
        form: Format of its rows.
        too_long: `drop` pairs that are too long, or cut the prompt (`prompt_left`).
        limit: Read the first well-formed rows only.
        max_bad_rows: Most malformed rows; None for any number, 0 to stop at the first.
        progress: Whether to draw a progress bar.
    """
    split = usable_pairs(model, data, form=form, too_long=too_long, limit=limit, max_bad_rows=max_bad_rows)
    rewards = score_pairs(model, split.pairs, progress=progress)
    recorded = model.manifest.uncertainty if model.manifest else None
    alone = recorded.temperature_alone if recorded else None
    metrics = evaluate(rewards, split.pairs, model.temperature, alone)
    return MeasuredPairs(split, rewards, model.temperature, metrics)


def usable_pairs(
    model: RewardModel,
    data: str,
    *,
    form: Form = "pairs",
    too_long: str = "drop",
    limit: int | None = None,
    max_bad_rows: int | None = None,
) -> Split:
    """Reads preference pairs and encodes them for a checkpoint.

    Raises:
        DataError: The place cannot be read, more rows are malformed than allowed, or no pair is usable.
    """
    source = read_source(data, expand(data), form, max_bad_rows=max_bad_rows)
    split = encode_pairs(Path(data).name, source.pairs[:limit], model.encoder, MarginMethod(), too_long)
    split.excluded.update(source.excluded)
    if not split.pairs:
        raise DataError(f"{data}: no usable pairs. {split.summary()}")
    return split


def measure_candidates(
    model: RewardModel, data: str, *, limit: int | None = None, max_bad_rows: int | None = None
) -> ScoredGroups:
    """Scores candidate groups with gold qualities.

    Args:
        model: The checkpoint.
        data: A file, a folder or a data set.
        limit: Read the first well-formed groups only.
        max_bad_rows: Most malformed rows; None for any number, 0 to stop at the first.

    Raises:
        DataError: The file cannot be read, has no usable group, or more rows are malformed than allowed.
    """
    return score_groups(model, load_groups(expand(data), max_bad_rows).first(limit))


def measure_difference(
    first: str,
    second: str,
    *,
    pairs: str | None,
    candidates: str | None,
    max_length: int | None = None,
    reading: ReadingOptions | None = None,
    max_bad_rows: int | None = None,
) -> MeasuredDifference:
    """Compares two checkpoints, loaded one after the other, on the same pairs, the same candidates, or both.

    Args:
        first: Folder or Hub name.
        second: Folder or Hub name.
        pairs: Preference pairs: a file, a folder or a data set.
        candidates: Candidate groups with gold qualities.
        max_length: Most tokens that a sequence may have; the checkpoints' own limits if None.
        reading: What the user says about both checkpoints.
        max_bad_rows: Most malformed rows of each file; None for any number, 0 to stop at the first.

    Raises:
        DataError: A file is unusable, or the checkpoints can read no pair in common.
        ModelError: A checkpoint cannot be loaded.
    """
    known: dict[str, EncodedPair] = {}
    margins: list[dict[str, float]] = []
    groups: list[ScoredGroups] = []
    notes: list[str] = []
    for path in (first, second):
        model = RewardModel.from_pretrained(path, max_length=max_length, reading=reading)
        if pairs:
            split = usable_pairs(model, pairs, max_bad_rows=max_bad_rows)
            by_source = {pair.pair.source: pair for pair in split.pairs}
            d = score_pairs(model, list(by_source.values()), progress=True).d.tolist()
            margins.append(dict(zip(by_source, d, strict=True)))
            known |= by_source
            notes.append(split.summary())
        if candidates:
            groups.append(measure_candidates(model, candidates, max_bad_rows=max_bad_rows))
            notes.append(groups[-1].summary())
    both = common(*margins) if pairs else None
    metrics = compare(*both) if both else {}
    if groups:
        groups = _common_prompts(*groups)
        metrics |= compare_picks(groups[0].rewards, groups[1].rewards, groups[0].gold)
    return MeasuredDifference(
        metrics=metrics,
        pairs=[known[source] for source in margins[0] if source in margins[1]] if pairs else [],
        margins=both,
        groups=(groups[0], groups[1]) if groups else None,
        notes=notes,
    )


def _common_prompts(first: ScoredGroups, second: ScoredGroups) -> list[ScoredGroups]:
    """Returns the prompts that both checkpoints can read."""
    both = set(first.sources) & set(second.sources)
    if not both:
        raise DataError("The checkpoints can read no prompt in common, so their picks cannot be compared.")
    return [first.only(both), second.only(both)]
