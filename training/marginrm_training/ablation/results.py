"""Finished runs of an ablation, by variant and place on the axes: what table and page are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from marginrm.calibration import Floats, correctness
from marginrm_training.ablation.cli import ARRAYS, Ablation, Evaluation, plan
from marginrm_training.evaluation.bootstrap import Estimate, seeds_estimate

Result = Mapping[str, Any]
Cell = tuple[str, tuple[Any, ...]]  # a variant and its place on the axes


@dataclass(frozen=True)
class Results:
    """Finished runs.

    Attributes:
        ablation: What is run.
        planned: How many runs there are in all.
        cells: The runs of each cell, one a seed.
        arrays: By run and evaluation: margins d, [pairs], or each prompt's quality of the pick, [prompts].
    """

    ablation: Ablation
    planned: int
    cells: Mapping[Cell, Sequence[Result]]
    arrays: Mapping[str, Mapping[str, Floats]]

    @classmethod
    def load(cls, ablation: Ablation, results: Sequence[Result]) -> Results:
        """Groups results and reads their arrays."""
        runs = plan(ablation)
        labels = {run.digest: run.label for run in runs}
        cells: dict[Cell, list[Result]] = {}
        for result in results:
            cells.setdefault((result["variant"], tuple(result["axes"].values())), []).append(result)
        kept = ablation.kept
        arrays = {result["digest"]: dict(np.load(kept / labels[result["digest"]] / ARRAYS)) for result in results}
        return cls(ablation, len(runs), cells, arrays)

    @property
    def finished(self) -> int:
        """How many runs there are."""
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
        """How much better than the baseline that is with the same seeds, where there is something to compare."""
        return {
            evaluation.name: {
                cell: seeds_estimate(self._beyond_baseline(cell, evaluation))
                for cell in self.cells
                if self.beside_baseline(cell)
            }
            for evaluation in self.ablation.evaluations
        }

    def metrics(self, cell: Cell, evaluation: Evaluation) -> list[Mapping[str, float]]:
        """Returns what each seed measured."""
        return [result["evaluations"][evaluation.name] for result in self.cells[cell]]

    def values(self, cell: Cell, evaluation: Evaluation) -> Floats:
        """Returns accuracy or quality of the pick, [seeds, items]."""
        return self._stack(self.cells[cell], evaluation)

    def margins(self, cell: Cell, evaluation: Evaluation) -> Floats:
        """Returns the margins of preference pairs, [seeds, pairs]."""
        return np.stack([self.arrays[result["digest"]][evaluation.name] for result in self.cells[cell]])

    def beside_baseline(self, cell: Cell) -> list[tuple[Result, Result]]:
        """Returns the baseline's run and this cell's for each seed that both have; nothing for the baseline itself."""
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
    """Returns how right a run is on each item: 1, 0 or .5 for a pair, the quality of the pick for a prompt."""
    values = arrays[evaluation.name]
    return correctness(values) if evaluation.kind == "pairs" else values
