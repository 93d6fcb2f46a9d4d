"""`marginrm ablate`: one training configuration, several variants and seeds, compared on several files."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from marginrm.errors import ConfigError, MarginRMError


def ablate(
    config: Annotated[Path, typer.Argument(help="TOML file, see examples/ablation_alpaca.toml.", show_default=False)],
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    limit_minutes: Annotated[
        float | None,
        typer.Option(help="Stop after this time; the same command continues later.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the configuration and list the runs.")] = False,
) -> None:
    """Train variants of one configuration with several seeds, and compare them on several files.

    Finished runs are kept in results.jsonl.gz: called again, the command continues where it was ended. The output
    folder holds results.jsonl, table.md, report.html with the figures, and a folder for each run.
    """
    from marginrm_training.ablation.plan import load_ablation, plan
    from marginrm_training.ablation.results import finished
    from marginrm_training.ablation.runner import run_all, run_folder

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("ablate starts its own processes: call it without accelerate or torchrun, with --jobs N.")
    ablation = load_ablation(config)
    if dry_run:
        runs = plan(ablation)
        known = {result["digest"] for result in finished(ablation.results_file, runs)}
        for run in runs:
            typer.echo(f"{'finished' if run.digest in known else 'to do   '} {run.label}")
        return
    received: list[int] = []  # an exception in the handler could lose a process that has just been started
    signal.signal(signal.SIGTERM, lambda number, _frame: received.append(number))
    failed = run_all(ablation, jobs=jobs, limit_minutes=limit_minutes, stopped=lambda: bool(received))
    if received:
        raise SystemExit(128 + received[0])
    table = Path(ablation.output) / "table.md"
    if table.is_file():
        typer.echo(table.read_text(encoding="utf-8"))
    if failed:
        logs = ", ".join(str(run_folder(ablation, run) / "log") for run in failed)
        raise MarginRMError(f"{len(failed)} runs failed. Their logs say why: {logs}")
