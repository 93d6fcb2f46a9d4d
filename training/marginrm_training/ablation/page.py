"""Results of an ablation -> one HTML page: each variant's measures beside the baseline's, and its margins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marginrm.calibration import Floats
from marginrm_training.ablation.plan import Evaluation
from marginrm_training.ablation.results import Result, Results
from marginrm_training.ablation.table import facts, introduction
from marginrm_training.evaluation.bootstrap import Estimate
from marginrm_training.report import plots
from marginrm_training.report.page import Section, write_page


def write_ablation_page(path: Path, title: str, results: Results, drawing: str) -> None:
    """Writes the page.

    Args:
        path: The file to write.
        title: Title of the page.
        results: The results.
        drawing: The figure that `differences` returns.

    Raises:
        OSError: It cannot be written.
    """
    note = "Right of 0 is better than the baseline. Lines are 95% intervals over items and seeds."
    sections = [
        Section(f"Difference to {results.ablation.baseline}", note, [drawing]),
        _training(results),
        *(_evaluation(evaluation, results) for evaluation in results.ablation.evaluations),
    ]
    note = introduction(results).replace("*", "").replace("`", "")
    write_page(path, title, note, {}, sections, [])


def differences(results: Results, *, standalone: bool = False) -> str:
    """Draws each variant's difference to the baseline on every evaluation, as SVG text.

    Args:
        results: The results.
        standalone: Whether the drawing becomes a file of its own.
    """
    panels = {
        name: {results.label(cell): estimate for cell, estimate in found.items()}
        for name, found in results.differences.items()
    }
    return plots.estimates(panels, zero=tuple(panels), standalone=standalone)


def _training(results: Results) -> Section:
    note = (
        "Share of pairs with a target margin, the mean target margin, and the fitted temperature. Lines reach from the "
        "lowest seed to the highest."
    )
    panels = {
        name: {results.label(cell): _seeds(runs, name) for cell, runs in results.cells.items()}
        for name in ("fire_rate", "mean_target_margin", "temperature")
    }
    return Section("Training", note, [plots.estimates(panels)])


def _evaluation(evaluation: Evaluation, results: Results) -> Section:
    pairs = evaluation.kind == "pairs"
    title = f"difference to {results.ablation.baseline}"
    panels = {
        panel: {results.label(cell): found[evaluation.name].get(cell) for cell in results.cells}
        for panel, found in {
            "accuracy" if pairs else "quality of the pick": results.measured,
            title: results.differences,
        }.items()
    }
    drawings = [plots.estimates(panels, zero=(title,))]
    if pairs:
        drawings += [plots.margin_distribution(margins) for margins in _margins(evaluation, results)]
    return Section(evaluation.name, facts(evaluation, results), drawings)


def _margins(evaluation: Evaluation, results: Results) -> list[dict[str, Floats]]:
    """Returns the margins of all seeds by the cell's name, separately for each place on the axes."""
    places: dict[tuple[Any, ...], dict[str, Floats]] = {}
    for cell in results.cells:
        places.setdefault(cell[1], {})[results.label(cell)] = results.margins(cell, evaluation).ravel()
    return list(places.values())


def _seeds(runs: Sequence[Result], name: str) -> Estimate | None:
    values = [run["train"][name] for run in runs if name in run["train"]]
    return (float(np.mean(values)), min(values), max(values)) if values else None
