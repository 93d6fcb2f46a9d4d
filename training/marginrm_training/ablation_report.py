"""Results of an ablation -> Markdown: means, intervals over items and seeds, and paired tests against the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marginrm_training.ablation import ARRAYS, Ablation, Evaluation, plan
from marginrm_training.comparison import discordant, mcnemar
from marginrm_training.evaluation import correctness

Floats = NDArray[np.float64]
_RESAMPLES = 2000
_COLUMNS = {
    "pairs": ("bt_nll", "ece_before", "ece", "margin_mean", "margin_skew", "spearman"),
    "best_of_n": (),
}
_TRAINING = ("fire_rate", "mean_target_margin", "temperature", "seconds", "peak_memory_gib")

Cell = tuple[str, tuple[Any, ...]]  # a variant and its place on the axes


def table(ablation: Ablation, results: Sequence[Mapping[str, Any]], runs: int) -> str:
    """Returns the report.

    Args:
        ablation: What was run.
        results: The finished runs.
        runs: How many runs there are in all.
    """
    labels = {run.digest: run.label for run in plan(ablation)}
    cells: dict[Cell, list[Mapping[str, Any]]] = {}
    for result in results:
        cells.setdefault((result["variant"], tuple(result["axes"].values())), []).append(result)
    arrays = {result["digest"]: dict(np.load(ablation.kept / labels[result["digest"]] / ARRAYS)) for result in results}
    introduction = (
        f"{len(results)} of {runs} runs. Mean over seeds ± the seeds' standard deviation; in brackets a 95% bootstrap "
        f"interval over items and seeds. *Difference*: to `{ablation.baseline}` with the same seeds, on the same items; "
        "McNemar's exact two-sided p for each seed. Intervals and p are of one comparison each, not corrected for how "
        "many there are."
    )
    parts = [
        introduction,
        _section("Training", _TRAINING, ablation, cells, lambda result: result["train"]),
    ]
    for evaluation in ablation.evaluations:
        parts.append(_evaluation(evaluation, ablation, cells, arrays))
        parts += _strengths(evaluation, ablation, cells)
    return "\n\n".join(parts) + "\n"


def interval(values: Floats, *, resamples: int = _RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Returns the 95% percentile interval of the mean of [seeds, items], resampling both.

    With few seeds the interval understates what another seed would do; the seeds' own deviation stands beside it.
    """
    generator = np.random.default_rng(seed)
    seeds, items = values.shape
    means = np.empty(resamples)
    for index in range(resamples):
        drawn = values[generator.integers(0, seeds, seeds)].mean(axis=0)
        means[index] = drawn[generator.integers(0, items, items)].mean()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _evaluation(
    evaluation: Evaluation,
    ablation: Ablation,
    cells: Mapping[Cell, Sequence[Mapping[str, Any]]],
    arrays: Mapping[str, Mapping[str, Floats]],
) -> str:
    pairs = evaluation.kind == "pairs"
    present = {
        name for results in cells.values() for result in results for name in result["evaluations"][evaluation.name]
    }
    columns = [name for name in _COLUMNS[evaluation.kind] if name in present]
    heads = [*_axis_names(ablation), "accuracy" if pairs else "pick's quality", "difference"]
    heads += ["McNemar p", *columns] if pairs else []
    lines = []
    for (variant, place), results in cells.items():
        values = _stack(results, arrays, evaluation)
        row = [variant, *map(str, place), _mean_and_interval(values)]
        base = {result["seed"]: result for result in cells.get((ablation.baseline, place), [])}
        both = [result for result in results if result["seed"] in base]
        own = variant != ablation.baseline and bool(both)
        against = _stack([base[result["seed"]] for result in both], arrays, evaluation) if own else None
        row.append(_difference(_stack(both, arrays, evaluation) - against) if against is not None else "")
        if pairs:
            ours = [arrays[result["digest"]][evaluation.name] for result in both]
            theirs = [arrays[base[result["seed"]]["digest"]][evaluation.name] for result in both]
            row.append(", ".join(_p(*margins) for margins in zip(theirs, ours, strict=True)) if own else "")
            row += [
                _spread([result["evaluations"][evaluation.name].get(name) for result in results]) for name in columns
            ]
        lines.append(row)
    some = next(iter(cells.values()))[0]["evaluations"][evaluation.name]
    return f"## {evaluation.name}\n\n{_facts(some, pairs=pairs)}\n\n{_markdown(heads, lines)}"


def _facts(metrics: Mapping[str, float], *, pairs: bool) -> str:
    left = f"{metrics['unusable']:,.0f} too long or unusable, {metrics['truncated']:,.0f} with a cut prompt."
    if pairs:
        return (
            f"{metrics['pairs']:,.0f} pairs; {left} The longer text is right in {metrics['pick_longest_accuracy']:.3f}."
        )
    known = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("random", "longest", "oracle"))
    return f"{metrics['prompts']:,.0f} prompts; candidates: {left} For scale: {known}."


def _strengths(
    evaluation: Evaluation, ablation: Ablation, cells: Mapping[Cell, Sequence[Mapping[str, Any]]]
) -> list[str]:
    first = next(iter(cells.values()))[0]["evaluations"][evaluation.name]
    names = [name for name in first if name.startswith("accuracy_strength_")]
    if not names:
        return []
    title = f"{evaluation.name}, accuracy by strength"
    return [_section(title, names, ablation, cells, lambda result: result["evaluations"][evaluation.name])]


def _section(title: str, names: Sequence[str], ablation: Ablation, cells: Mapping[Cell, Any], of: Any) -> str:
    heads = [*_axis_names(ablation), *(name.removeprefix("accuracy_strength_").replace("_", " to ") for name in names)]
    if title == "Training":
        heads = [*_axis_names(ablation), *names]
    lines = [
        [variant, *map(str, place), *(_spread([of(result).get(name) for result in results]) for name in names)]
        for (variant, place), results in cells.items()
    ]
    return f"## {title}\n\n{_markdown(heads, lines)}"


def _axis_names(ablation: Ablation) -> list[str]:
    return ["variant", *(name.rpartition(".")[2] for name in ablation.axes)]


def _stack(
    results: Sequence[Mapping[str, Any]], arrays: Mapping[str, Mapping[str, Floats]], evaluation: Evaluation
) -> Floats:
    values = [arrays[result["digest"]][evaluation.name] for result in results]
    return np.stack([correctness(value) if evaluation.kind == "pairs" else value for value in values])


def _mean_and_interval(values: Floats) -> str:
    low, high = interval(values)
    return f"{values.mean():.4f}{_deviation(values.mean(axis=1))} [{low:.4f}, {high:.4f}]"


def _difference(values: Floats) -> str:
    low, high = interval(values)
    return f"{values.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def _p(theirs: Floats, ours: Floats) -> str:
    return f"{mcnemar(*discordant(theirs, ours)):.2g}"


def _spread(values: Sequence[float | None]) -> str:
    found = np.array([value for value in values if value is not None], dtype=np.float64)
    return f"{found.mean():.4f}{_deviation(found)}" if len(found) else ""


def _deviation(values: Floats) -> str:
    return f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
