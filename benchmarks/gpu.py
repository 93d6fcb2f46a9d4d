"""`python -m benchmarks.gpu`: scoring and training on one GPU, unattended, in minutes; called again, it continues.

It needs PyTorch 2.11 or newer, the library's and the training package's dependencies, and neither a network nor the web
server's packages. `PYTHONPATH=src:service:training:.` takes the place of an installation. With TRL and datasets in the
same environment, training is compared with TRL. In this order:

- parity: two layers of each shape, against the float32 loop on the CPU;
- scoring: each shape in bfloat16, against padded batches of Hugging Face with SDPA in arrival order and sorted by length;
- training: each shape in bfloat16, against TRL.

Results are kept for each card. `--device cpu --models tiny --trained tiny` rehearses it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.harness.command import DataFolder, all_known, app_of
from benchmarks.harness.texts import Sample, Texts, load_texts
from benchmarks.harness.worker_process import ROOT, WorkerError
from benchmarks.harness.workloads import WORKLOADS, Samples, Workload
from benchmarks.models import MINILM_SHAPE, NAMES, SHALLOW
from benchmarks.throughput import report
from benchmarks.throughput.compare import Clock, Comparison, Setting
from benchmarks.throughput.contenders import Contender, gpu_contenders, interpreters, parity_contenders
from benchmarks.throughput.results import Results
from benchmarks.throughput.targets import TRAINING, gpu_findings
from benchmarks.training import speed

_MODELS = "qwen3-0.6b,pythia-2.8b,llama-3-8b"
_TRAINED = f"{MINILM_SHAPE},smollm2-135m,pythia-410m"
_SCORED = ("bon-short", "bon-long", "pairs", "trainer")
_LEAST_SECONDS = 20.0  # a stage that would have less is left to the next call
_TRAINING_STEPS, _TRAINING_ROUNDS, _TRAINING_BATCH = 4, 3, 16

Stage = Callable[[Clock], None]


def main(
    minutes: Annotated[float, typer.Option(help="Time limit; the same command continues from there.")] = 8.0,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal.")] = "cuda",
    models: Annotated[str, typer.Option(help="Comma-separated shapes to score with.")] = _MODELS,
    trained: Annotated[str, typer.Option(help="Comma-separated shapes to train.")] = _TRAINED,
    workloads: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(WORKLOADS)}.")] = ",".join(_SCORED),
    rounds: Annotated[int, typer.Option(min=1, help="Times that each contender scores each workload.")] = 2,
    scale: Annotated[int, typer.Option(min=1, help="Multiple of the samples that a CPU scores.")] = 2,
    data: DataFolder = None,
    output: Annotated[Path, typer.Option(help="Folder for results.")] = Path("runs/gpu"),
    model_folder: Annotated[
        Path | None, typer.Option(help="Folder for models, 25 GB by default; a memory file system is fastest.")
    ] = None,
) -> None:
    """Measure scoring and training on this machine's GPU."""
    clock = Clock(minutes * 60)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM then ends the workers too
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "PyTorch finds no CUDA device. Rehearse with --device cpu --models tiny --trained tiny."
        )
    card = torch.cuda.get_device_name().replace(" ", "_") if device == "cuda" else "cpu"
    run = _Run(
        data,
        load_texts(data),
        Results(output / card / "measurements.jsonl", torch.get_num_threads()),
        device,
        [replace(WORKLOADS[name], groups=WORKLOADS[name].groups * scale) for name in all_known(workloads, WORKLOADS)],
        rounds,
        output / card,
        model_folder or output / "models",
    )
    for name, stage in run.stages(all_known(models, NAMES), all_known(trained, NAMES)).items():
        if clock.left < _LEAST_SECONDS:
            typer.echo(f"Out of time before {name}: the same command continues from there.", err=True)
            break
        run.attempt(name, stage, clock)
    typer.echo(run.write())


@dataclass(frozen=True, slots=True)
class _Run:
    data: Path | None
    texts: Texts
    results: Results
    device: str
    workloads: Sequence[Workload]
    rounds: int
    output: Path
    models: Path

    def stages(self, models: Sequence[str], trained: Sequence[str]) -> dict[str, Stage]:
        """Returns the stages by name, in their order: small models first."""
        shallow = [name + SHALLOW if name + SHALLOW in NAMES else name for name in models]
        parity = {
            f"parity, {name}": lambda clock, name=name: self._compare(
                name, parity_contenders(self.device), [WORKLOADS["pairs"]], 1, clock
            )
            for name in shallow
        }
        scoring = {
            f"scoring, {name}": lambda clock, name=name: self._compare(
                name, gpu_contenders(self.device), self.workloads, self.rounds, clock
            )
            for name in models
        }
        training = {f"training, {name}": lambda _, name=name: self._train(name) for name in trained}
        first, *large = scoring.items()
        return parity | dict([first]) | training | dict(large)

    def attempt(self, name: str, stage: Stage, clock: Clock) -> None:
        """Runs a stage. An error is reported and kept; the next stage follows."""
        _report(name)
        try:
            stage(clock)
        except (WorkerError, RuntimeError, ValueError, OSError, subprocess.CalledProcessError) as error:
            _report(f"{name} failed: {error}")
            self.results.add_study("error", name, {"error": " ".join(str(error).split())[-500:]})
        self.write()

    def write(self) -> str:
        """Writes `report.md` and `summary.json`, and returns the report."""
        found = gpu_findings(self.results)
        tables = [report.markdown(self.results, found, self.texts.source)]
        trained = [findings for (kind, _), findings in self.results.studies.items() if kind == TRAINING]
        if trained:
            tables += [speed.markdown(trained, self.texts.source, _TRAINING_BATCH)]
        text = "\n\n".join(tables)
        (self.output / "report.md").write_text(text + "\n", encoding="utf-8")
        summary = json.dumps(report.summary(self.results, found), indent=1)
        (self.output / "summary.json").write_text(summary + "\n", encoding="utf-8")
        return text

    def _compare(
        self, name: str, contenders: Sequence[Contender], workloads: Sequence[Workload], rounds: int, clock: Clock
    ) -> None:
        if all(
            self.results.finished(name, workload.name, number, [one.name for one in contenders if one.scores(workload)])
            for workload in workloads
            for number in range(rounds)
        ):
            return  # without building the model again
        folder = self._build(name)
        setting = Setting(contenders, interpreters(), torch.get_num_threads(), _report, warm_up=None)
        Comparison(name, folder, Samples(folder, self.texts), setting, self.results).run(workloads, rounds, clock)

    def _train(self, name: str) -> None:
        if (TRAINING, name) in self.results.studies:
            return
        folder = self._build(name)
        size = _TRAINING_STEPS * _TRAINING_BATCH
        pairs = list(islice(speed.short_pairs(Samples(folder, self.texts)), (_TRAINING_ROUNDS + 1) * size))
        samples = [Sample(tuple(pairs[start : start + size])) for start in range(0, len(pairs), size)]
        peer = all(importlib.util.find_spec(package) for package in ("trl", "datasets"))
        trainers = speed.trainers(["bt"], "bfloat16", _TRAINING_BATCH, Path(sys.executable) if peer else None)
        found = speed.interleave(folder, samples, trainers).summary()
        loss_only = speed.loss_seconds(["bt"], _TRAINING_BATCH)
        self.results.add_study(
            TRAINING, name, {"model": name, "workload": speed.SHORT} | found | {"loss_seconds": loss_only}
        )

    def _build(self, name: str) -> Path:
        """Writes a model in a process of its own, which gives the GPU's memory back."""
        command = [sys.executable, "-m", "benchmarks.models", name, "--folder", str(self.models.resolve())]
        command += ["--device", self.device]
        if self.data is not None:
            command += ["--data", str(self.data.resolve())]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return self.models / name


def _report(line: str) -> None:
    typer.echo(line, err=True)


if __name__ == "__main__":
    app_of(main)()
