"""The commands of the training package. What needs torch is imported inside, so that --help is quick."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from marginrm.manifest import Calibration
    from marginrm.reward_model import RewardModel
    from marginrm_training.data.splits import EncodedPair, Split
    from marginrm_training.evaluation.benchmarks.sections import Benchmark
    from marginrm_training.evaluation.best_of_n import BestOfNPoint
    from marginrm_training.evaluation.groups import ScoredGroups
    from marginrm_training.report.run_report import Report

Data = Annotated[
    Path, typer.Option("--data", help="Preference pairs: a file, a folder or a data set.", show_default=False)
]
Model = Annotated[str, typer.Option("--model", help="Checkpoint folder or Hub name.", show_default=False)]
Groups = Annotated[
    Path, typer.Option("--data", help="Groups of candidates with gold qualities, .jsonl.", show_default=False)
]
Candidates = Annotated[
    Path | None,
    typer.Option(help="Groups of candidates with gold qualities, for Best-of-N.", show_default=False),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting: --set optim.learning_rate=2e-5. Repeatable.")
]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Most tokens a sequence may have; the checkpoint's own limit if unset.", show_default=False),
]
Format = Literal["auto", "pairs", "rewardbench", "rewardbench2", "rm-bench", "rmb", "judgebench"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of lines for people.")]


def train(
    config: Annotated[Path, typer.Argument(help="TOML file, see examples/quickstart.toml.", show_default=False)],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the last saved step of this run.")] = True,
) -> None:
    """Train a reward model: checks the data, trains, calibrates, evaluates, and writes a checkpoint that serves.

    The checkpoint's report.html shows the run: learning curves, margins before and after, calibration, mistakes.
    """
    from marginrm_training.config import load_config
    from marginrm_training.run.train import train as run

    _quiet()
    settings = load_config(config, overrides or ())
    manifest = run(settings, resume=resume, dry_run=dry_run)
    if manifest:
        _show(manifest.metrics)
        if manifest.calibration:
            _show_temperature(manifest.calibration)
        typer.echo(f"written to {settings.output}")
        typer.echo(f"look at it: {settings.output}/report.html")
        typer.echo(f"serve it: marginrm serve --model {settings.output}")


def evaluate(
    model: Model,
    data: Data,
    max_length: MaxLength = None,
    as_json: Json = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Also write an HTML page: figures, and the worst mistakes as text.", show_default=False),
    ] = None,
    candidates: Candidates = None,
    form: Annotated[
        Format, typer.Option("--format", help="What the rows are; by default told by the first row's fields.")
    ] = "auto",
) -> None:
    """Measure a checkpoint on preference pairs: accuracy, NLL, calibration, by strength, and what length explains.

    Rows of RewardBench, RewardBench 2, RM-Bench, RMB and JudgeBench are scored by those benchmarks' own rules.
    Intervals are 95% bootstrap intervals over pairs.
    """
    from marginrm.errors import ConfigError
    from marginrm.reward_model import RewardModel

    _quiet()
    benchmark = _benchmark(data, form)
    if benchmark and (report or candidates):
        raise ConfigError(f"--report and --candidates go with pairs, and this is {benchmark}. Leave them out.")
    if candidates and not report:
        raise ConfigError("--candidates adds a figure to --report FILE.html; for the curve alone: marginrm best-of-n.")
    loaded = RewardModel.from_pretrained(model, max_length=max_length)
    if benchmark:
        _show(_benchmark_metrics(loaded, benchmark, data), as_json=as_json)
        return
    measured = _measured(loaded, model, data)
    _show(measured.metrics, as_json=as_json)
    if report:
        replace(measured, best_of_n=_curve(_scored(loaded, candidates)) if candidates else ()).write(report)
        typer.echo(f"report written to {report}", err=True)


def calibrate(model: Model, data: Data) -> None:
    """Fit the temperature of any reward model on preference pairs, and write it into its manifest."""
    from marginrm.calibration import calibrate as fit
    from marginrm.errors import ModelError
    from marginrm.reward_model import RewardModel
    from marginrm_training.checkpoint.export import recalibrated
    from marginrm_training.evaluation.pairs import score_pairs

    _quiet()
    folder = Path(model)
    if not folder.is_dir():
        raise ModelError(f"{model} is no folder. The manifest is written beside the weights, so save the model first.")
    loaded = RewardModel.from_pretrained(folder, dtype="float32")
    split = _pairs(loaded, data)
    calibration = fit(score_pairs(loaded, split.pairs, progress=True).d.tolist())
    recalibrated(loaded, folder.name, calibration, split.pairs).save(folder)
    _show_temperature(calibration)


def compare(
    first: Annotated[str, typer.Option("--first", help="Checkpoint folder or Hub name.", show_default=False)],
    second: Annotated[str, typer.Option("--second", help="The one to compare it with.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Preference pairs.", show_default=False)] = None,
    candidates: Candidates = None,
    max_length: MaxLength = None,
    as_json: Json = False,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML page.", show_default=False)] = None,
) -> None:
    """Compare two checkpoints on the same pairs (--data), the same candidates (--candidates), or both.

    Pairs: both accuracies, a paired bootstrap of their difference and McNemar's test. Candidates: the win rate of the
    second's Best-of-N picks over the first's, over all prompts, a draw being half a win.
    """
    from marginrm.errors import ConfigError
    from marginrm.reward_model import RewardModel
    from marginrm_training.evaluation.comparison import common, compare_picks
    from marginrm_training.evaluation.comparison import compare as measure
    from marginrm_training.report.comparison_report import ComparisonReport

    _quiet()
    if not data and not candidates:
        raise ConfigError("Nothing to compare on: give --data FILE (pairs), --candidates FILE (groups), or both.")
    scored, groups = [], []
    pairs: dict[str, EncodedPair] = {}
    for path in (first, second):
        model = RewardModel.from_pretrained(path, max_length=max_length)
        if data:
            margins, known = _margins(model, data)
            scored.append(margins)
            pairs |= known
        if candidates:
            groups.append(_scored(model, candidates))
    both = common(*scored) if data else None
    metrics = measure(*both) if both else {}
    if groups:
        metrics |= compare_picks(groups[0].rewards, groups[1].rewards, groups[0].gold)
    _show(metrics, as_json=as_json)
    if report:
        shared = [pairs[source] for source in scored[0] if source in scored[1]] if scored else []
        curves = (_curve(groups[0]), _curve(groups[1])) if groups else None
        ComparisonReport(first, second, metrics, shared, both, curves).write(report)
        typer.echo(f"report written to {report}", err=True)


def best_of_n(model: Model, data: Groups, max_length: MaxLength = None, as_json: Json = False) -> None:
    """Measure Best-of-N: the quality of the candidate the model picks, for N = 1, 2, 4, ... candidates per prompt.

    Beside it stand the longest text, the best candidate and a random one; in brackets a 95% interval over prompts.
    """
    from marginrm.reward_model import RewardModel

    _quiet()
    points = _curve(_scored(RewardModel.from_pretrained(model, max_length=max_length), data))
    if as_json:
        typer.echo(json.dumps([{name: getattr(point, name) for name in point.__slots__} for point in points]))
        return
    typer.echo(f"{'N':>4} {'KL':>6} {'model':>8} {'':>18} {'longest':>8} {'oracle':>8} {'random':>8}")
    for point in points:
        interval = f"[{point.model_low:.4f}, {point.model_high:.4f}]"
        typer.echo(
            f"{point.n:>4} {point.kl:>6.2f} {point.model:>8.4f} {interval:>18} {point.longest:>8.4f} "
            f"{point.oracle:>8.4f} {point.random:>8.4f}"
        )


def demo(
    output: Annotated[Path, typer.Option(help="Where to write the checkpoint.")] = Path("checkpoints/demo"),
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Do nothing if there is one already.")] = False,
    seed: Annotated[int, typer.Option(help="Of data, weights and order.")] = 0,
) -> None:
    """Train the demo reward model: a tiny model on made-up graded preferences, in about two minutes on two cores."""
    from marginrm.manifest import MANIFEST_NAME

    if if_missing and (output / MANIFEST_NAME).is_file():
        return
    from marginrm_training.demo.build import build_demo

    _quiet()
    report = build_demo(output, seed)
    typer.echo(report)


def _benchmark(data: Path, form: Format) -> Benchmark | None:
    """Returns whose rows these are, or None for plain pairs; what was told by the rows is said."""
    from marginrm_training.data.sources import read_raw
    from marginrm_training.evaluation.benchmarks.formats import recognised

    if form != "auto":
        return None if form == "pairs" else form
    first = next(iter(read_raw(str(data))), None)
    found = recognised(first[0]) if first else None
    if found:
        typer.echo(f"{data}: recognised as {found}, scored by its rule; --format pairs takes it as pairs", err=True)
    return found


def _benchmark_metrics(model: RewardModel, benchmark: Benchmark, data: Path) -> dict[str, float]:
    from marginrm_training.data.sources import read_raw
    from marginrm_training.evaluation.benchmarks.formats import parse_cases
    from marginrm_training.evaluation.benchmarks.measure import score_cases
    from marginrm_training.evaluation.benchmarks.scoring import score

    cases = parse_cases(benchmark, read_raw(str(data)))
    rewards, counts = score_cases(model, cases)
    found = score(benchmark, cases, rewards)
    if found.missing:
        typer.echo(f"no overall: {len(found.missing)} subsets are missing: {', '.join(found.missing)}", err=True)
    if counts["unreadable"]:
        typer.echo(f"{counts['unreadable']:,.0f} cases are too long for the model, and count as wrong", err=True)
    return counts | found.metrics


def _scored(model: RewardModel, data: Path) -> ScoredGroups:
    from marginrm_training.evaluation.groups import load_groups, score_groups

    scored = score_groups(model, load_groups(data))
    typer.echo(scored.summary(), err=True)
    return scored


def _curve(scored: ScoredGroups) -> list[BestOfNPoint]:
    """Returns the curve, and says where it ends and why."""
    from marginrm_training.evaluation.best_of_n import best_of_n_curve, curve_end

    points = best_of_n_curve(scored.rewards, scored.gold, scored.lengths)
    if end := curve_end(points, scored.gold):
        typer.echo(end, err=True)
    return points


def _margins(model: RewardModel, data: Path) -> tuple[dict[str, float], dict[str, EncodedPair]]:
    """Returns each pair's margin and the pair itself, both by `path:line`."""
    from marginrm_training.evaluation.pairs import score_pairs

    pairs = {pair.pair.source: pair for pair in _pairs(model, data).pairs}
    d = score_pairs(model, list(pairs.values()), progress=True).d.tolist()
    return dict(zip(pairs, d, strict=True)), pairs


def _measured(model: RewardModel, name: str, data: Path) -> Report:
    """Measures a model on pairs; what it finds is a report, whether or not that is written."""
    from marginrm_training.evaluation.bootstrap import evaluation_intervals
    from marginrm_training.evaluation.pairs import evaluate as measure
    from marginrm_training.evaluation.pairs import score_pairs
    from marginrm_training.report.run_report import Report

    split = _pairs(model, data)
    rewards = score_pairs(model, split.pairs, progress=True)
    metrics = measure(rewards, split.pairs, model.temperature) | evaluation_intervals(rewards.d, model.temperature)
    return Report(name, split.summary(), split.pairs, rewards, model.temperature, metrics)


def _pairs(model: RewardModel, data: Path) -> Split:
    from marginrm.errors import DataError
    from marginrm_training.data.splits import encode_pairs, read
    from marginrm_training.method.margins import MarginMethod

    split = encode_pairs(data.name, read(str(data)), model.encoder, MarginMethod())
    typer.echo(split.summary(), err=True)
    if not split.pairs:
        raise DataError(f"{data}: no usable pairs. {split.summary()}")
    return split


def _show(metrics: Mapping[str, float], *, as_json: bool = False) -> None:
    from marginrm_training.report.text import lines

    if as_json:
        typer.echo(json.dumps(dict(metrics), indent=2))
        return
    width = max(len(name) for name in metrics)
    for name, text in lines(metrics):
        typer.echo(f"{name:<{width}}  {text}")


def _show_temperature(fitted: Calibration) -> None:
    within = "{:.3f} to {:.3f}, ".format(*fitted.temperature_interval) if fitted.temperature_interval else ""
    typer.echo(
        f"temperature {fitted.temperature:.3f} ({within}from {fitted.n:,} pairs; "
        f"their ECE {fitted.ece_before:.4f} -> {fitted.ece_after:.4f})"
    )
    if fitted.note:
        typer.echo(fitted.note)


def _quiet() -> None:
    """Leaves the terminal to our own progress bars."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    for noisy in ("httpx", "huggingface_hub", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
