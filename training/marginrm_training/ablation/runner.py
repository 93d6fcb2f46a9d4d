"""The processes of an ablation: one for each run that is not finished, a few at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from marginrm.progress import progress_bar
from marginrm_training.ablation.page import differences, write_ablation_page
from marginrm_training.ablation.plan import RESULT, SPEC, Ablation, Run, plan
from marginrm_training.ablation.results import Results, finished, keep_result
from marginrm_training.ablation.table import table
from marginrm_training.demo.build import write_demo

_POLL_SECONDS = 0.2


def run_all(
    ablation: Ablation,
    *,
    jobs: int = 1,
    limit_minutes: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Run]:
    """Makes all runs that are not finished, each in a process of its own, and writes results and reports.

    A run that the time limit cuts short continues from its last saved step when it is called again.

    Args:
        ablation: The ablation.
        jobs: Processes at a time.
        limit_minutes: After this time running processes are ended, and no other one is started.
        stopped: Called at every poll; once it returns True, running processes are ended as by the time limit.

    Returns:
        The runs that failed.
    """
    runs = plan(ablation)
    _prepare(ablation, runs)
    done = {result["digest"] for result in finished(ablation.results_file, runs)}
    pending = [run for run in runs if run.digest not in done]
    deadline = time.monotonic() + limit_minutes * 60 if limit_minutes is not None else float("inf")
    active: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}
    failed: list[Run] = []
    with progress_bar("ablation", len(runs), "run", initial=len(done)) as bar:
        try:
            while (pending or active) and time.monotonic() < deadline and not stopped():
                while pending and len(active) < jobs:
                    run = pending.pop(0)
                    active[run.digest] = (run, _start(ablation, run, jobs))
                    bar.set_postfix_str(run.label)
                for run, process in [one for one in active.values() if one[1].poll() is not None]:
                    del active[run.digest]
                    if process.returncode:
                        failed.append(run)
                        bar.write(f"{run.label} failed; why: {run_folder(ablation, run) / 'log'}", sys.stderr)
                    else:
                        _collect(ablation, run)
                        bar.update()
                    write_reports(ablation, runs)
                time.sleep(_POLL_SECONDS)
        finally:
            for _, process in active.values():
                process.terminate()
                process.wait()
    write_reports(ablation, runs)
    return failed


def run_folder(ablation: Ablation, run: Run) -> Path:
    """Returns the folder of a run's specification, log and steps to resume from."""
    return Path(ablation.output) / "runs" / run.label


def write_spec(ablation: Ablation, run: Run, folder: Path) -> None:
    """Writes to `folder`/spec.json all that the run's process needs to know."""
    spec = {
        "run": run.label,
        "variant": run.variant,
        "axes": run.axes,
        "seed": run.seed,
        "config": run.config | {"output": str(folder / "checkpoint")},
        "digest": run.digest,
        "evaluations": [item.model_dump() for item in ablation.evaluations],
        "keep_checkpoints": ablation.keep_checkpoints,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SPEC).write_text(json.dumps(spec, indent=2), encoding="utf-8")


def write_reports(ablation: Ablation, runs: Sequence[Run]) -> None:
    """Writes `results.jsonl` (without arrays), and from finished runs `table.md`, `report.html`, `differences.svg`."""
    output = Path(ablation.output)
    found = finished(ablation.results_file, runs)
    rows = [{name: value for name, value in result.items() if name != "arrays"} for result in found]
    (output / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if found:
        results = Results.load(ablation, found)
        (output / "table.md").write_text(table(results), encoding="utf-8")
        drawing = differences(results)
        (ablation.results_folder / "differences.svg").write_text(
            differences(results, standalone=True), encoding="utf-8"
        )
        write_ablation_page(output / "report.html", output.name, results, drawing)


def _prepare(ablation: Ablation, runs: Sequence[Run]) -> None:
    """Writes the demo if the ablation trains on it, and collects runs that ended after the command had been killed."""
    output = Path(ablation.output)
    output.mkdir(parents=True, exist_ok=True)
    if ablation.demo and not (output / "demo" / "start" / "tokenizer.json").is_file():
        write_demo(output / "demo")
    known = {result["digest"] for result in finished(ablation.results_file, runs)}
    for run in runs:
        if run.digest not in known and (run_folder(ablation, run) / RESULT).is_file():
            _collect(ablation, run)


def _collect(ablation: Ablation, run: Run) -> None:
    """Adds a finished run's result to the results file."""
    text = (run_folder(ablation, run) / RESULT).read_text(encoding="utf-8")
    keep_result(ablation.results_file, json.loads(text))


def _start(ablation: Ablation, run: Run, jobs: int) -> subprocess.Popen[bytes]:
    folder = run_folder(ablation, run)
    write_spec(ablation, run, folder)
    # Several processes with a thread on every core each would only wait for one another.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "marginrm_training.ablation.worker", str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=threads | os.environ,
        )
