"""Finished runs of an ablation: the file that keeps them, and their grouping by variant for table and page.

`results.jsonl.gz` has one JSON row for each finished run: `run` (its label), `digest`, `variant`, `axes`, `seed`,
`config`, `train` and `evaluations` (metrics by name), and `arrays`: by evaluation, the margins of all pairs or the gold
quality of each prompt's pick. JSON holds every float64 exactly, so tables and figures made from the file stay the same.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from marginrm.atomic_file import replace_file
from marginrm.calibration import Floats, correctness
from marginrm.errors import DataError
from marginrm_training.ablation.plan import Ablation, Evaluation, Run, plan
from marginrm_training.evaluation.bootstrap import Estimate, seeds_estimate

Result = Mapping[str, Any]
Cell = tuple[str, tuple[Any, ...]]  # a variant and its place on the axes


def read_results(path: Path) -> list[Result]:
    """Returns the rows of a results file in their order; an empty list if there is no such file.

    Raises:
        DataError: The file cannot be read.
    """
    if not path.is_file():
        return []
    try:
        text = gzip.decompress(path.read_bytes()).decode()
        return [json.loads(line) for line in text.splitlines()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Restore it, or move it away to run everything again."
        ) from error


def keep_result(path: Path, result: Result) -> None:
    """Adds the row of a finished run to a results file, in place of an earlier row of the same digest.

    The file is replaced in one step, so a reader or a kill never meets half of it. Rows of other ablations stay.
    """
    rows = {row["digest"]: row for row in read_results(path)} | {result["digest"]: result}
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, gzip.compress(text.encode(), mtime=0))


def finished(path: Path, runs: Sequence[Run]) -> list[Result]:
    """Returns the rows of a results file that belong to these runs, in the order of the runs."""
    rows = {row["digest"]: row for row in read_results(path)}
    return [rows[run.digest] for run in runs if run.digest in rows]


@dataclass(frozen=True)
class Results:
    """Finished runs.

    Attributes:
        ablation: The ablation.
        planned: Number of runs in all.
        cells: The runs of each cell, one for each seed.
        arrays: By run and evaluation: margins d, [pairs], or each prompt's quality of the pick, [prompts].
    """

    ablation: Ablation
    planned: int
    cells: Mapping[Cell, Sequence[Result]]
    arrays: Mapping[str, Mapping[str, Floats]]

    @classmethod
    def load(cls, ablation: Ablation, results: Sequence[Result]) -> Results:
        """Groups the rows of finished runs."""
        cells: dict[Cell, list[Result]] = {}
        for result in results:
            cells.setdefault((result["variant"], tuple(result["axes"].values())), []).append(result)
        arrays = {
            result["digest"]: {name: np.array(values, dtype=np.float64) for name, values in result["arrays"].items()}
            for result in results
        }
        return cls(ablation, len(plan(ablation)), cells, arrays)

    @property
    def finished(self) -> int:
        """Number of finished runs."""
        return len(self.arrays)

    @property
    def axes(self) -> list[str]:
        """Names of the axes."""
        return [name.rpartition(".")[2] for name in self.ablation.axes]

    def label(self, cell: Cell) -> str:
        """Returns a cell's name for people."""
        variant, place = cell
        return ", ".join([variant, *(f"{name} {value}" for name, value in zip(self.axes, place, strict=True))])

    @cached_property
    def measured(self) -> dict[str, dict[Cell, Estimate]]:
        """Accuracy or quality of the pick, by evaluation and cell."""
        return {
            evaluation.name: {cell: seeds_estimate(self.values(cell, evaluation)) for cell in self.cells}
            for evaluation in self.ablation.evaluations
        }

    @cached_property
    def differences(self) -> dict[str, dict[Cell, Estimate]]:
        """Difference of `measured` to the baseline's with the same seeds, by evaluation and comparable cell."""
        return {
            evaluation.name: {
                cell: seeds_estimate(self._beyond_baseline(cell, evaluation))
                for cell in self.cells
                if self.beside_baseline(cell)
            }
            for evaluation in self.ablation.evaluations
        }

    def metrics(self, cell: Cell, evaluation: Evaluation) -> list[Mapping[str, float]]:
        """Returns the metrics of each seed's run."""
        return [result["evaluations"][evaluation.name] for result in self.cells[cell]]

    def values(self, cell: Cell, evaluation: Evaluation) -> Floats:
        """Returns accuracy or quality of the pick, [seeds, items]."""
        return self._stack(self.cells[cell], evaluation)

    def margins(self, cell: Cell, evaluation: Evaluation) -> Floats:
        """Returns the margins of preference pairs, [seeds, pairs]."""
        return np.stack([self.arrays[result["digest"]][evaluation.name] for result in self.cells[cell]])

    def beside_baseline(self, cell: Cell) -> list[tuple[Result, Result]]:
        """Returns the baseline's run and this cell's for each seed that both have; an empty list for the baseline."""
        variant, place = cell
        if variant == self.ablation.baseline:
            return []
        base = {result["seed"]: result for result in self.cells.get((self.ablation.baseline, place), [])}
        return [(base[result["seed"]], result) for result in self.cells[cell] if result["seed"] in base]

    def _beyond_baseline(self, cell: Cell, evaluation: Evaluation) -> Floats:
        theirs, ours = zip(*self.beside_baseline(cell), strict=True)
        return self._stack(ours, evaluation) - self._stack(theirs, evaluation)

    def _stack(self, results: Sequence[Result], evaluation: Evaluation) -> Floats:
        return np.stack([item_scores(evaluation, self.arrays[result["digest"]]) for result in results])


def item_scores(evaluation: Evaluation, arrays: Mapping[str, Floats]) -> Floats:
    """Returns a run's score on each item: 1, 0 or .5 for a pair, the quality of the pick for a prompt."""
    values = arrays[evaluation.name]
    return correctness(values) if evaluation.kind == "pairs" else values
