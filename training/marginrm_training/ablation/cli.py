"""`marginrm ablate`: one training configuration, several variants and seeds; each run a process, finished ones kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm.auto import tqdm

from marginrm.errors import ConfigError, MarginRMError

FLIP = "flip"  # the axis that no training configuration has: the share of training labels to swap
RESULT, ARRAYS = "result.json", "arrays.npz"  # of a finished run, in its folder
_POLL_SECONDS = 0.2


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Evaluation(_Section):
    """[[evaluations]]: a file on which every run is measured."""

    name: str
    path: str = Field(description="Preference pairs or candidate groups.")
    kind: Literal["pairs", "best_of_n"] = "pairs"
    format: Literal["pairs", "hh_rlhf", "shp"] = "pairs"
    limit: int | None = Field(None, ge=1, description="Use the first rows only.")
    max_length: int | None = Field(None, description="Most tokens a sequence may have here; the checkpoint's if unset.")


class Ablation(_Section):
    """A whole ablation: variants x axes x seeds of one base configuration.

    Attributes:
        output: Folder of the runs, `results.jsonl`, `table.md` and `report.html`.
        results: Folder for what finished runs found, small enough to be kept under version control, so that another
            machine goes on where this one stopped, and for `differences.svg`; without it they stay in `output`.
        baseline: The variant that the others are compared with, pair by pair.
        seeds: Of head, split and order; the same seed gives all variants the same.
        variants: By name, the settings (`section.key`) that make it.
        axes: Settings with several values each, crossed with the variants; `flip` swaps that share of training labels.
        base: The training configuration that they change.
        evaluations: What every run is measured on.
        demo: Whether to write the demo's data and untrained model to `output`/demo first.
        keep_checkpoints: Whether a run's weights stay after it was measured.
    """

    output: str
    results: str | None = None
    baseline: str
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    axes: dict[str, tuple[Any, ...]] = {}
    base: dict[str, Any]
    evaluations: tuple[Evaluation, ...] = Field(min_length=1)
    demo: bool = False
    keep_checkpoints: bool = False

    @property
    def kept(self) -> Path:
        """Where each finished run has a folder with its result and its arrays."""
        return Path(self.results) if self.results else Path(self.output) / "runs"


@dataclass(frozen=True, slots=True)
class Run:
    """One training run of an ablation.

    Attributes:
        variant: The variant's name.
        axes: Its place on the axes.
        seed: Its seed.
        config: The training configuration, without `output`.
        digest: Of everything that decides its result.
    """

    variant: str
    axes: dict[str, Any]
    seed: int
    config: dict[str, Any]
    digest: str

    @property
    def label(self) -> str:
        """A name for people and folders."""
        places = [f"{key.rpartition('.')[2]}={value}" for key, value in self.axes.items()]
        return "-".join([self.variant, *places, f"seed{self.seed}", self.digest[:8]]).replace("/", "_")


def load_ablation(path: Path) -> Ablation:
    """Reads an ablation from a TOML file.

    Raises:
        ConfigError: The file, a key or a value is wrong.
    """
    try:
        ablation = Ablation.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}. Give the path of a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(f"{path}: {'; '.join(faults)}. examples/ablation_alpaca.toml has every key.") from None
    if ablation.baseline not in ablation.variants:
        raise ConfigError(f"{path}: baseline = {ablation.baseline!r} is none of the variants.")
    return ablation


def plan(ablation: Ablation) -> list[Run]:
    """Returns all runs, seed by seed, so that a cut-short ablation has compared all variants on the first seeds.

    Raises:
        ConfigError: A variant or an axis makes a training configuration that is wrong.
    """
    from marginrm_training.config import parse_config

    runs = []
    for seed, values in itertools.product(ablation.seeds, itertools.product(*ablation.axes.values())):
        axes = dict(zip(ablation.axes, values, strict=True))
        for variant, changes in ablation.variants.items():
            settings = {key: value for key, value in (axes | changes).items() if key != FLIP}
            config = _changed(ablation.base, settings | {"seed": seed})
            parse_config(config | {"output": "-"}, f"variant {variant}")
            decisive = [config, axes.get(FLIP), [item.model_dump() for item in ablation.evaluations]]
            digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
            runs.append(Run(variant, axes, seed, config, digest))
    return runs


def finished(kept: Path, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the results that belong to these runs, in their order."""
    results = {}
    for run in runs:
        path = kept / run.label / RESULT
        if path.is_file():
            results[run.digest] = json.loads(path.read_text(encoding="utf-8"))
    return [results[run.digest] for run in runs if run.digest in results]


def run_all(ablation: Ablation, *, jobs: int = 1, limit_minutes: float | None = None) -> list[Run]:
    """Runs what is not finished yet, each run in a process of its own, and writes results and table.

    A run that is cut short by the time limit goes on from its last saved step next time.

    Args:
        ablation: What to run.
        jobs: Processes at a time.
        limit_minutes: After this time, running processes are ended and nothing new is begun.

    Returns:
        The runs that failed.
    """
    output = Path(ablation.output)
    runs = plan(ablation)
    _prepare(ablation, output)
    done = {result["digest"] for result in finished(ablation.kept, runs)}
    pending = [run for run in runs if run.digest not in done]
    deadline = time.monotonic() + limit_minutes * 60 if limit_minutes is not None else float("inf")
    active: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}
    failed: list[Run] = []
    with tqdm(total=len(runs), initial=len(done), desc="ablation", unit="run") as bar:
        try:
            while (pending or active) and time.monotonic() < deadline:
                while pending and len(active) < jobs:
                    run = pending.pop(0)
                    folder = output / "runs" / run.label
                    write_spec(ablation, run, folder)
                    active[run.digest] = (run, _start(folder, jobs))
                    bar.set_postfix_str(run.label)
                for run, process in list(active.values()):
                    if process.poll() is not None:
                        del active[run.digest]
                        if process.returncode:
                            failed.append(run)
                            bar.write(f"{run.label} failed; why: {output / 'runs' / run.label / 'log'}", sys.stderr)
                        else:
                            _keep(output / "runs" / run.label, ablation.kept / run.label)
                            bar.update()
                        write_report(ablation, output, runs)
                time.sleep(_POLL_SECONDS)
        finally:
            for _, process in active.values():
                process.terminate()
                process.wait()
    write_report(ablation, output, runs)
    return failed


def write_report(ablation: Ablation, output: Path, runs: Sequence[Run]) -> None:
    """Writes `results.jsonl`, and from the runs that are finished `table.md`, `report.html` and `differences.svg`."""
    from marginrm_training.ablation.page import differences, write_ablation_page
    from marginrm_training.ablation.results import Results
    from marginrm_training.ablation.table import table

    found = finished(ablation.kept, runs)
    lines = "".join(json.dumps(result) + "\n" for result in found)
    (output / "results.jsonl").write_text(lines, encoding="utf-8")
    if found:
        results = Results.load(ablation, found)
        (output / "table.md").write_text(table(results), encoding="utf-8")
        drawing = differences(results)
        (Path(ablation.results or output) / "differences.svg").write_text(drawing, encoding="utf-8")
        write_ablation_page(output / "report.html", output.name, results, drawing)


def ablate(
    config: Annotated[Path, typer.Argument(help="TOML file, see examples/ablation_alpaca.toml.", show_default=False)],
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    limit_minutes: Annotated[
        float | None, typer.Option(help="Stop after this time; the same command goes on later.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the configuration and list the runs.")] = False,
) -> None:
    """Train variants of one configuration with several seeds, and compare them on several files.

    Finished runs are kept: called again, the command goes on where it was ended. RESULTS are in the output folder:
    results.jsonl, table.md, report.html with the figures, and a folder for each run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("ablate starts its own processes: call it without accelerate or torchrun, with --jobs N.")
    ablation = load_ablation(config)
    output = Path(ablation.output)
    if dry_run:
        runs = plan(ablation)
        known = {result["digest"] for result in finished(ablation.kept, runs)}
        for run in runs:
            typer.echo(f"{'finished' if run.digest in known else 'to do   '} {run.label}")
        return
    signal.signal(signal.SIGTERM, _leave)
    failed = run_all(ablation, jobs=jobs, limit_minutes=limit_minutes)
    if (output / "table.md").is_file():
        typer.echo((output / "table.md").read_text(encoding="utf-8"))
    if failed:
        logs = ", ".join(str(output / "runs" / run.label / "log") for run in failed)
        raise MarginRMError(f"{len(failed)} runs failed. Their logs say why: {logs}")


def _leave(number: int, _frame: object) -> None:
    """Ends the command in order, so that it ends the runs it has started."""
    raise SystemExit(128 + number)


def _keep(made: Path, kept: Path) -> None:
    """Puts a finished run's result where results are kept; it comes last there too."""
    if made == kept:
        return
    kept.mkdir(parents=True, exist_ok=True)
    for name in (ARRAYS, RESULT):
        shutil.copyfile(made / name, kept / name)


def _prepare(ablation: Ablation, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if ablation.demo and not (output / "demo" / "start" / "tokenizer.json").is_file():
        from marginrm_training.ablation.worker import write_demo

        write_demo(output / "demo")


def write_spec(ablation: Ablation, run: Run, folder: Path) -> None:
    """Writes to `folder`/spec.json all that the run's process needs to know."""
    spec = {
        "variant": run.variant,
        "axes": run.axes,
        "seed": run.seed,
        "config": run.config | {"output": str(folder / "checkpoint")},
        "digest": run.digest,
        "evaluations": [item.model_dump() for item in ablation.evaluations],
        "keep_checkpoints": ablation.keep_checkpoints,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec, indent=2), encoding="utf-8")


def _start(folder: Path, jobs: int) -> subprocess.Popen[bytes]:
    # Several processes that each take all cores would only wait for one another.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "marginrm_training.ablation.worker", str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=threads | os.environ,
        )


def _changed(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(base))
    for key, value in settings.items():
        *sections, name = key.split(".")
        table = config
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return config
