"""Results of an ablation -> Markdown: means, intervals over items and seeds, and paired tests against the baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from marginrm.calibration import Floats
from marginrm_training.ablation.plan import Evaluation
from marginrm_training.ablation.results import Cell, Result, Results
from marginrm_training.evaluation.bootstrap import Estimate
from marginrm_training.evaluation.comparison import discordant, mcnemar

_COLUMNS = ("bt_nll", "ece_before", "ece", "margin_mean", "margin_skew", "spearman")  # of preference pairs
_TRAINING = ("fire_rate", "mean_target_margin", "temperature", "seconds", "peak_memory_gib")
_STRENGTH = "accuracy_strength_"


def table(results: Results) -> str:
    """Returns the tables."""
    parts = [introduction(results), _section("Training", _TRAINING, results, lambda result: result["train"])]
    for evaluation in results.ablation.evaluations:
        parts.append(_evaluation(evaluation, results))
        parts += _strengths(evaluation, results)
    return "\n\n".join(parts) + "\n"


def introduction(results: Results) -> str:
    """Returns the number of finished runs, and an explanation of the figures."""
    return (
        f"{results.finished} of {results.planned} runs. Mean over seeds ± the seeds' standard deviation; in brackets a 95% "
        f"bootstrap interval over items and seeds. *Difference*: to `{results.ablation.baseline}` with the same seeds, on "
        "the same items; McNemar's exact two-sided p for each seed. Intervals and p are for one comparison each, not "
        "corrected for multiple comparisons. Seconds of a resumed run are those since it was resumed."
    )


def facts(evaluation: Evaluation, results: Results) -> str:
    """Returns the size of an evaluation's data, and the figures of trivial scorers to compare with."""
    metrics = _any(evaluation, results)
    left = f"{metrics['unusable']:,.0f} too long or unusable, {metrics['truncated']:,.0f} with a cut prompt."
    if evaluation.kind == "pairs":
        return (
            f"{metrics['pairs']:,.0f} pairs; {left} The longer text is right in {metrics['pick_longest_accuracy']:.3f}."
        )
    known = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("random", "longest", "oracle"))
    return f"{metrics['prompts']:,.0f} prompts; candidates: {left} For scale: {known}."


def _evaluation(evaluation: Evaluation, results: Results) -> str:
    pairs = evaluation.kind == "pairs"
    measured = {name for cell in results.cells for metrics in results.metrics(cell, evaluation) for name in metrics}
    columns = [name for name in _COLUMNS if pairs and name in measured]
    heads = ["variant", *results.axes, "accuracy" if pairs else "pick's quality", "difference"]
    heads += ["McNemar p", *columns] if pairs else []
    rows = []
    for cell in results.cells:
        seeds = results.values(cell, evaluation).mean(axis=1)
        row = [*_place(cell), _measured(results.measured[evaluation.name][cell], seeds)]
        row.append(_difference(results.differences[evaluation.name].get(cell)))
        if pairs:
            both = [
                [results.arrays[result["digest"]][evaluation.name] for result in seed]
                for seed in results.beside_baseline(cell)
            ]
            row.append(", ".join(f"{mcnemar(*discordant(*margins)):.2g}" for margins in both))
            metrics = results.metrics(cell, evaluation)
            row += [_spread([one.get(name) for one in metrics]) for name in columns]
        rows.append(row)
    return f"## {evaluation.name}\n\n{facts(evaluation, results)}\n\n{_markdown(heads, rows)}"


def _strengths(evaluation: Evaluation, results: Results) -> list[str]:
    names = [name for name in _any(evaluation, results) if name.startswith(_STRENGTH)]
    title = f"{evaluation.name}, accuracy by strength"
    found = _section(title, names, results, lambda result: result["evaluations"][evaluation.name])
    return [found] if names else []


def _section(title: str, names: Sequence[str], results: Results, of: Callable[[Result], Mapping[str, float]]) -> str:
    heads = ["variant", *results.axes]
    heads += [
        name.removeprefix(_STRENGTH).replace("_", " to ") if name.startswith(_STRENGTH) else name for name in names
    ]
    rows = [
        [*_place(cell), *(_spread([of(result).get(name) for result in runs]) for name in names)]
        for cell, runs in results.cells.items()
    ]
    return f"## {title}\n\n{_markdown(heads, rows)}"


def _any(evaluation: Evaluation, results: Results) -> Mapping[str, float]:
    return results.metrics(next(iter(results.cells)), evaluation)[0]


def _place(cell: Cell) -> list[str]:
    variant, place = cell
    return [variant, *map(str, place)]


def _measured(estimate: Estimate, seeds: Floats) -> str:
    mean, low, high = estimate
    return f"{mean:.4f}{_deviation(seeds)} [{low:.4f}, {high:.4f}]"


def _difference(estimate: Estimate | None) -> str:
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*estimate) if estimate else ""


def _spread(values: Sequence[float | None]) -> str:
    found = np.array([value for value in values if value is not None], dtype=np.float64)
    return f"{found.mean():.4f}{_deviation(found)}" if len(found) else ""


def _deviation(values: Floats) -> str:
    return f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
