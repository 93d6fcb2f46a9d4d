"""A checkpoint on a benchmark's file -> the benchmark's score, with rewards from the same call that serving uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from marginrm.encoding import EncodedResponse
from marginrm.errors import EncodingError
from marginrm.progress import progress_bar
from marginrm.reward_model import RewardModel
from marginrm.texts.places import read_raw
from marginrm_training.data.excluded import ExcludedRows
from marginrm_training.evaluation.benchmarks.formats import Case, parse_cases, recognised
from marginrm_training.evaluation.benchmarks.scoring import UNREADABLE, Rewards, score
from marginrm_training.evaluation.benchmarks.sections import Benchmark


@dataclass(frozen=True, slots=True)
class MeasuredBenchmark:
    """A checkpoint's score on a benchmark.

    Attributes:
        metrics: Counts, `overall`, sections and subsets by name, with the ends of their intervals.
        notes: Sentences for people on what limits the score.
    """

    metrics: dict[str, float]
    notes: Sequence[str]


def benchmark_of(data: str) -> Benchmark | None:
    """Returns the benchmark whose rows a file or data set holds, by its first readable row; None for plain pairs."""
    first = next(iter(read_raw(data, on_error=lambda _: None)), None)
    return recognised(first[0]) if first else None


def measure_benchmark(model: RewardModel, benchmark: Benchmark, data: str) -> MeasuredBenchmark:
    """Scores a checkpoint on a benchmark by the benchmark's own rule.

    A malformed row is an error: with a row left out, the score would not be the benchmark's.

    Raises:
        DataError: The place cannot be read, or a row is not of this benchmark.
    """
    cases = parse_cases(benchmark, read_raw(data))
    rewards, counts, unreadable = score_cases(model, cases)
    found = score(benchmark, cases, rewards)
    notes = []
    if found.missing:
        notes.append(f"no overall: {len(found.missing)} subsets are missing: {', '.join(found.missing)}")
    if unreadable.total:
        notes.append(f"cases that the model cannot read, which count as wrong: {unreadable}")
    return MeasuredBenchmark(counts | found.metrics, notes)


def score_cases(model: RewardModel, cases: Sequence[Case]) -> tuple[list[Rewards], dict[str, float], ExcludedRows]:
    """Scores all responses of all cases, cutting prompts from the left where that makes a response fit.

    A case with a response that the model cannot read counts as wrong: leaving it out would make the benchmark easier.

    Returns:
        The rewards of each case's chosen and rejected responses, counts (`cases`, `truncated`: those with a cut prompt,
        and `unreadable`), and the unreadable cases by reason.
    """
    encoded: list[list[EncodedResponse]] = []
    readable: list[int] = []
    unreadable = ExcludedRows()
    truncated = 0
    for index, case in enumerate(cases):
        outcomes = model.encoder.encode_group(case.prompt, [*case.chosen, *case.rejected], "prompt_left")
        kept = [outcome for outcome in outcomes if isinstance(outcome, EncodedResponse)]
        if len(kept) == len(outcomes):
            encoded.append(kept)
            readable.append(index)
            truncated += any(response.truncated for response in kept)
        else:
            fault = next(outcome for outcome in outcomes if isinstance(outcome, EncodingError))
            unreadable.add(fault.reason, case.source)
    with progress_bar("scoring", sum(map(len, encoded)), "response") as bar:
        scored = model.score_encoded(encoded, progress=bar.update)
    rewards: list[Rewards] = [UNREADABLE] * len(cases)
    for index, values in zip(readable, scored, strict=True):
        right = len(cases[index].chosen)
        rewards[index] = (values[:right], values[right:])
    counts = {"cases": len(cases), "truncated": truncated, "unreadable": unreadable.total}
    return rewards, {name: float(count) for name, count in counts.items()}, unreadable
