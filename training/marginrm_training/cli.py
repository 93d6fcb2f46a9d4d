"""The commands of the training package: parse, call, print. Libraries are imported when a command runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from marginrm.cli.reading import takes_reading
from marginrm.errors import ConfigError, NoUncertaintyError
from marginrm.reading import ReadingOptions

if TYPE_CHECKING:
    from marginrm.manifest import Calibration, GroupMeasure
    from marginrm_training.evaluation.benchmarks.sections import Benchmark
    from marginrm_training.evaluation.best_of_n import BestOfNPoint
    from marginrm_training.evaluation.groups import ScoredGroups

Data = Annotated[
    Path, typer.Option("--data", help="Preference pairs: a file, a folder or a data set.", show_default=False)
]
Model = Annotated[str, typer.Option("--model", help="Checkpoint folder or Hub name.", show_default=False)]
Groups = Annotated[
    Path,
    typer.Option(
        "--data", help="Groups of candidates with gold qualities: a file, a folder or a data set.", show_default=False
    ),
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
MaxBadRows = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Most malformed rows of a file. They are left out and counted by reason with their lines; 0 stops at the "
        "first. Unset: any number, but not all.",
        show_default=False,
    ),
]
Format = Literal["auto", "pairs", "rewardbench", "rewardbench2", "rm-bench", "rmb", "judgebench"]
_CHOICE = {"prompts", "sets", "accuracy", "ece", "chance", "best_share", "p_best_ece"}  # of a GroupMeasure
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of lines for people.")]


def train(
    config: Annotated[Path, typer.Argument(help="TOML file, see examples/quickstart.toml.", show_default=False)],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Resume from the last saved step of this run.")] = True,
) -> None:
    """Train a reward model: checks the data, trains, calibrates, evaluates, and writes a checkpoint that serves.

    The checkpoint's report.html shows the run: learning curves, margins before and after, calibration, mistakes.
    """
    from marginrm_training.config import load_config

    settings = load_config(config, overrides or ())

    # Its imports take seconds, so a fault of the file comes first.
    from marginrm_training.run.train import train as run

    _configure_logging()
    manifest = run(settings, resume=resume, dry_run=dry_run)
    if manifest:
        _show(manifest.metrics)
        if manifest.calibration:
            _show_temperature(manifest.calibration)
        typer.echo(f"written to {settings.output}")
        typer.echo(f"look at it: {settings.output}/report.html")
        typer.echo(f"serve it: marginrm serve --model {settings.output}")


@takes_reading
def evaluate(
    model: Model,
    data: Data,
    reading: ReadingOptions,
    max_length: MaxLength = None,
    as_json: Json = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Also write an HTML page: figures, and the worst mistakes as text.", show_default=False),
    ] = None,
    candidates: Candidates = None,
    max_bad_rows: MaxBadRows = None,
    to_within: Annotated[
        float | None,
        typer.Option(
            min=0.0001,
            max=0.5,
            help="Also print the number of pairs whose accuracy is known to +- this, such as 0.02 (95%).",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="Format of the rows; by default recognised by the first row's fields.")
    ] = "auto",
) -> None:
    """Measure a checkpoint on preference pairs: accuracy, NLL, calibration, by strength, and what length explains.

    Rows of RewardBench, RewardBench 2, RM-Bench, RMB and JudgeBench are scored by those benchmarks' own rules.
    Intervals are 95% bootstrap intervals over pairs.
    """
    from marginrm.reward_model import RewardModel
    from marginrm_training.evaluation.benchmarks.measure import measure_benchmark
    from marginrm_training.evaluation.measure import measure_candidates, measure_pairs
    from marginrm_training.evaluation.sample_size import half_width, pairs_within
    from marginrm_training.report.run_report import Report

    _configure_logging()
    benchmark = _benchmark(data, form)
    if benchmark and (report or candidates or to_within):
        raise ConfigError(
            f"--report, --candidates and --to-within are for pairs, and this is {benchmark}. Leave them out."
        )
    _check_report(report)
    if candidates and not report:
        raise ConfigError("--candidates adds a figure to --report FILE.html; for the curve alone: marginrm best-of-n.")
    loaded = RewardModel.from_pretrained(model, max_length=max_length, reading=reading)
    if benchmark:
        scored = measure_benchmark(loaded, benchmark, str(data))
        _tell(scored.notes)
        _show(scored.metrics, as_json=as_json)
        return
    measured = measure_pairs(loaded, str(data), max_bad_rows=max_bad_rows)
    d = measured.rewards.d
    metrics = measured.metrics | measured.intervals() | {"accuracy_half_width": half_width(d)}
    if to_within is not None:
        metrics[f"pairs_to_within_{to_within:g}"] = float(pairs_within(d, to_within))
    _tell([measured.split.summary()])
    _show(metrics, as_json=as_json)
    if report:
        curve: Sequence[BestOfNPoint] = ()
        if candidates:
            scored_groups = measure_candidates(loaded, str(candidates), max_bad_rows=max_bad_rows)
            _tell([scored_groups.summary()])
            curve = _curve(scored_groups)
        subtitle, pairs = measured.split.summary(), measured.split.pairs
        Report(model, subtitle, pairs, measured.rewards, measured.temperature, metrics, best_of_n=curve).write(report)
        _tell([f"report written to {report}"])


@takes_reading
def calibrate(
    model: Model,
    data: Data,
    reading: ReadingOptions,
    max_bad_rows: MaxBadRows = None,
    style_control: Annotated[
        bool,
        typer.Option(
            "--style-control",
            help="Let length and markdown explain labels while T is fitted, so that T is that of the content.",
        ),
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Compute how sure the head's weights are, from these pairs: replies then carry margin_std and "
            "familiarity, and confidence integrates over them.",
        ),
    ] = False,
    candidates: Annotated[
        Path | None,
        typer.Option(
            help="Groups of candidates with gold qualities, of prompts that the model was not trained on: calibrates "
            "the confidence of the best of N.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Fit the temperature of any reward model on preference pairs, and write it into its manifest.

    With --candidates it also fits the temperatures of the best of N, and prints how well they hold for prompts that they
    were not fitted on. A missing manifest is begun. So is one that cannot be read; the old file is kept beside it. The
    whole calibration is replaced: without --candidates or --uncertainty, what an earlier run fitted by them is removed.
    """
    from marginrm_training.checkpoint.recalibrate import recalibrate

    _configure_logging()
    groups = str(candidates) if candidates else None
    found = recalibrate(
        Path(model),
        str(data),
        reading,
        max_bad_rows,
        style_control=style_control,
        candidates=groups,
        uncertainty=uncertainty,
    )
    _tell(found.notes)
    _show_temperature(found.calibration)
    if found.uncertainty:
        typer.echo(
            f"uncertainty: margins have a standard deviation of {found.uncertainty.margin_std:.3f}; with T alone "
            f"({found.uncertainty.temperature_alone:.3f}) the ECE is {found.uncertainty.ece_alone:.4f}"
        )
    if found.groups:
        fitted = found.groups.temperature
        typer.echo(
            f"choices among N: T {fitted.temperature:.3f} at N = 2, times (N / 2)^{fitted.pick_slope:.2f} for the best "
            f"against the runner-up, (N / 2)^{fitted.best_slope:.2f} for p_best (from {found.groups.prompts:,} prompts)"
        )
        _show_choices(found.groups.by_n)


@takes_reading
def compare(
    first: Annotated[str, typer.Option("--first", help="Checkpoint folder or Hub name.", show_default=False)],
    second: Annotated[str, typer.Option("--second", help="The one to compare it with.", show_default=False)],
    reading: ReadingOptions,
    data: Annotated[Path | None, typer.Option(help="Preference pairs.", show_default=False)] = None,
    candidates: Candidates = None,
    max_length: MaxLength = None,
    max_bad_rows: MaxBadRows = None,
    as_json: Json = False,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML page.", show_default=False)] = None,
) -> None:
    """Compare two checkpoints on the same pairs (--data), the same candidates (--candidates), or both.

    Pairs: both accuracies, a paired bootstrap of their difference and McNemar's test. Candidates: the win rate of the
    second's Best-of-N picks over the first's, over all prompts, a draw being half a win.
    """
    from marginrm_training.evaluation.measure import measure_difference
    from marginrm_training.report.comparison_report import ComparisonReport

    _configure_logging()
    if not data and not candidates:
        raise ConfigError("Nothing to compare on: give --data FILE (pairs), --candidates FILE (groups), or both.")
    _check_report(report)
    pairs, groups = (str(path) if path else None for path in (data, candidates))
    found = measure_difference(
        first,
        second,
        pairs=pairs,
        candidates=groups,
        max_length=max_length,
        reading=reading,
        max_bad_rows=max_bad_rows,
    )
    _tell(found.notes)
    _show(found.metrics, as_json=as_json)
    if report:
        curves = (_curve(found.groups[0]), _curve(found.groups[1])) if found.groups else None
        ComparisonReport(first, second, found.metrics, found.pairs, found.margins, curves).write(report)
        _tell([f"report written to {report}"])


@takes_reading
def best_of_n(
    model: Model,
    data: Groups,
    reading: ReadingOptions,
    max_length: MaxLength = None,
    max_bad_rows: MaxBadRows = None,
    as_json: Json = False,
    risk_averse: Annotated[
        float,
        typer.Option(
            min=0, metavar="K", help="Rank by reward - K std, for a checkpoint calibrated with --uncertainty."
        ),
    ] = 0.0,
) -> None:
    """Measure Best-of-N: the quality of the candidate the model picks, for N = 1, 2, 4, ... candidates per prompt.

    Beside it stand the longest text, the best candidate and a random one; in brackets a 95% interval over prompts.
    """
    from marginrm.reward_model import RewardModel
    from marginrm_training.evaluation.groups import groups_of
    from marginrm_training.evaluation.measure import measure_candidates

    _configure_logging()
    loaded = RewardModel.from_pretrained(model, max_length=max_length, reading=reading)
    if risk_averse and loaded.readout is None:
        raise NoUncertaintyError
    scored = measure_candidates(loaded, str(data), max_bad_rows=max_bad_rows)
    _tell([scored.summary()])
    choices = [] if risk_averse else scored.confidences(groups_of(loaded))
    points = _curve(scored.averse(risk_averse))
    if as_json:
        source = "groups" if loaded.info.groups else "pairs"
        known = {one.n: one.model_dump(include=_CHOICE) | {"confidence_from": source} for one in choices}
        rows = [{name: getattr(point, name) for name in point.__slots__} | known.get(point.n, {}) for point in points]
        typer.echo(json.dumps(rows))
        return
    typer.echo(f"{'N':>4} {'KL':>6} {'model':>8} {'':>18} {'longest':>8} {'oracle':>8} {'random':>8}")
    for point in points:
        interval = f"[{point.model_low:.4f}, {point.model_high:.4f}]"
        typer.echo(
            f"{point.n:>4} {point.kl:>6.2f} {point.model:>8.4f} {interval:>18} {point.longest:>8.4f} "
            f"{point.oracle:>8.4f} {point.random:>8.4f}"
        )
    if choices:
        typer.echo(f"\nconfidence of the pick, by the temperature of {'groups' if loaded.info.groups else 'pairs'}")
        _show_choices(choices)


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path("checkpoints/demo"),
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Do nothing if there is one already.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of data, weights and order.")] = 0,
) -> None:
    """Train the demo reward model: a tiny model on made-up graded preferences, in about two minutes on two cores."""
    from marginrm.manifest import MANIFEST_NAME

    if if_missing and (output / MANIFEST_NAME).is_file():
        return
    from marginrm_training.demo.build import build_demo

    _configure_logging()
    typer.echo(build_demo(output, seed))


def _benchmark(data: Path, form: Format) -> Benchmark | None:
    """Returns the benchmark whose rows these are, or None for plain pairs; a recognised benchmark is printed."""
    from marginrm_training.evaluation.benchmarks.measure import benchmark_of

    if form != "auto":
        return None if form == "pairs" else form
    found = benchmark_of(str(data))
    if found:
        _tell([f"{data}: recognised as {found}, scored by its rule; --format pairs reads it as pairs"])
    return found


def _check_report(report: Path | None) -> None:
    """Checks that a report can be written, before anything is computed.

    Raises:
        ConfigError: It cannot.
    """
    if report and (report.is_dir() or not report.absolute().parent.is_dir()):
        raise ConfigError(f"--report {report}: give the path of a file, in a folder that exists.")


def _curve(scored: ScoredGroups) -> Sequence[BestOfNPoint]:
    """Returns the Best-of-N curve, and prints where it ends early and why."""
    points = scored.curve()
    if end := scored.curve_end(points):
        _tell([end])
    return points


def _tell(lines: Iterable[str]) -> None:
    """Prints lines for people on stderr, where they do not mix with --json."""
    for line in lines:
        typer.echo(line, err=True)


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
    if fitted.style:
        weights = ", ".join(f"{name} {weight:+.2f}" for name, weight in fitted.style.items())
        typer.echo(f"fitted beside style, whose weights are not served: {weights}")
    if fitted.note:
        typer.echo(fitted.note)


def _show_choices(choices: Iterable[GroupMeasure]) -> None:
    """Prints the quality of the confidences of choices, by N."""
    typer.echo(f"{'N':>4} {'sets':>6} {'right':>7} {'ECE':>16} {'by chance':>9} {'best':>7} {'ECE of p_best':>16}")
    for one in choices:
        pick, best = (
            f"{after:.3f}" if before == after else f"{before:.3f} -> {after:.3f}"
            for before, after in ((one.ece_before, one.ece), (one.p_best_ece_before, one.p_best_ece))
        )
        typer.echo(
            f"{one.n:>4} {one.sets:>6,} {one.accuracy:>7.3f} {pick:>16} {one.chance:>9.3f} {one.best_share:>7.3f} "
            f"{best:>16}"
        )


def _configure_logging() -> None:
    """Shows warnings and our own messages, without transformers' messages and progress bars."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    for noisy in ("httpx", "huggingface_hub", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
