"""Measurements -> Markdown tables, a JSON summary, a figure, and the section of a page between two markers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.harness.rates import Spread, median_or_none
from benchmarks.throughput.contenders import OURS, OVER_HTTP, ours
from benchmarks.throughput.results import Results
from benchmarks.throughput.targets import TRAINING, Finding, gemm_shares, speed_ratio

BEGIN = "<!-- results: begin; written by python -m benchmarks.run -->"
END = "<!-- results: end -->"
_MIB = 2**20
_OURS_COLOUR, _OTHERS_COLOUR = "#1f5fa8", "#9aa5b1"


def cells(results: Results) -> list[dict[str, Any]]:
    """Returns one summary for each model, workload and contender."""
    keys = dict.fromkeys((m.model, m.workload, m.contender) for m in results.measurements)
    return [_cell(results, *key) for key in keys]


def _cell(results: Results, model: str, workload: str, contender: str) -> dict[str, Any]:
    found = [m for m in results.measurements if (m.model, m.workload, m.contender) == (model, workload, contender)]
    differences = [m.difference for m in found if m.difference is not None]
    names = {m.contender for m in results.measurements if (m.model, m.workload) == (model, workload)}
    ratio = speed_ratio(results.measurements, model, workload, ours(workload, names), contender)
    return {
        "model": model,
        "workload": workload,
        "contender": contender,
        "rounds": len(found),
        "rewards_per_second": asdict(_spread([m.rate for m in found])),
        "tokens_per_second": median(m.tokens / m.seconds for m in found),
        "computed_share": median_or_none(m.computed / m.tokens for m in found if m.computed),
        "host_share": median_or_none(m.host_share for m in found if m.host_share is not None),
        "gemm_share": median_or_none(gemm_shares(results, model, workload, contender)),
        "peak_over_loaded_mib": max(m.peak_memory - m.loaded_memory for m in found) / _MIB,
        "peak_mib": max(m.peak_memory for m in found) / _MIB,
        "difference": max(differences, default=None),
        "deviation": median_or_none(m.deviation for m in found if m.deviation),
        "ours_times": None if ratio is None else asdict(ratio),
        "others": max(m.others for m in found),
    }


def summary(results: Results, findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns everything as plain values for a JSON file."""
    return {
        "machine": results.machine,
        "cells": cells(results),
        "targets": [asdict(finding) | {"verdict": finding.verdict} for finding in findings],
        "studies": [{"study": name, "model": model, **f} for (name, model), f in results.studies.items()],
        "contenders": [
            {"model": model, "contender": name, **detail} for (model, name), detail in results.details.items()
        ],
    }


def markdown(results: Results, findings: Sequence[Finding], source: str) -> str:
    """Returns the tables.

    Args:
        results: The measurements.
        findings: The targets with their measured values.
        source: The name of the texts' source.
    """
    machine = results.machine
    processor = f"{machine['processor']}, {machine['threads']} threads, {', '.join(machine['bf16']) or 'no bf16 units'}"
    place = f"{machine['gpu']}; {processor}" if machine["gpu"] else processor
    lines = [
        f"Measured on {place}; torch {machine['torch']}, transformers {machine['transformers']}; texts: {source}.",
        "",
        "| target | at least, or at most | measured (lowest to highest round) | |",
        "|---|---:|---:|---|",
    ]
    lines += [f"| {f.text} | {f.bound:g} | {f.found.text()} | {f.verdict} |" for f in findings if f.found]
    missing = [f"- {f.text} ({f.bound:g})" for f in findings if not f.found]
    lines += ["", "Targets that were not measured in this run:", "", *missing] * bool(missing)
    summaries = cells(results)
    for model, workload in dict.fromkeys((cell["model"], cell["workload"]) for cell in summaries):
        chosen = [cell for cell in summaries if (cell["model"], cell["workload"]) == (model, workload)]
        lines += ["", f"**{model}, {workload}**", "", *_table(chosen)]
    for (name, model), finding in results.studies.items():
        if name == TRAINING:
            continue  # has a table of its own
        lines += ["", f"**{name}, {model}**", "", "| | |", "|---|---:|"]
        lines += [f"| {key} | {_number(value)} |" for key, value in finding.items()]
    lines += [""]
    lines += [
        f"- {name} with {model}: {detail['path']}."
        for (model, name), detail in results.details.items()
        if name == OURS and "path" in detail
    ]
    excluded = [(model, name) for (model, name), detail in results.details.items() if "error" in detail]
    lines += [f"- {name} could not take part with {model}." for model, name in excluded]
    return "\n".join(lines).strip()


def _table(chosen: Sequence[dict[str, Any]]) -> list[str]:
    base = ours(chosen[0]["workload"], [cell["contender"] for cell in chosen])
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "contender": lambda cell: cell["contender"],
        "rewards/s": lambda cell: Spread(**cell["rewards_per_second"]).text(),
        "tokens/s": lambda cell: f"{cell['tokens_per_second']:,.0f}",
        "computed / requested": lambda cell: _number(cell["computed_share"]),
        "GEMM share": lambda cell: _percent(cell["gemm_share"]),
        "host share": lambda cell: _percent(cell["host_share"]),
        "MiB over loaded": lambda cell: f"{cell['peak_over_loaded_mib']:,.0f}",
        "differs by": _difference,
        f"{base} is": lambda cell: _times(cell) if cell["contender"] != base else "",
    }
    if all(cell["host_share"] is None for cell in chosen):
        del columns["host share"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    ordered = sorted(chosen, key=lambda cell: cell["rewards_per_second"]["median"])
    lines += [f"| {' | '.join(write(cell) for write in columns.values())} |" for cell in ordered]
    rounds, others = {cell["rounds"] for cell in chosen}, max(cell["others"] for cell in chosen)
    lines += ["", f"{min(rounds)} rounds; other processes used at most {others:.0%} of the cores meanwhile."]
    return lines


def draw(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws rewards per second, a panel for each workload: medians as bars, lowest to highest round as lines.

    Args:
        summaries: The summaries that `cells` returns; without any, nothing is drawn.
        path: The file; its suffix sets the format.
    """
    panels = list(dict.fromkeys((cell["model"], cell["workload"]) for cell in summaries))
    if not panels:
        return
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 0.6 + 2.2 * len(panels)), squeeze=False)
    for axis, (model, workload) in zip(axes[:, 0], panels, strict=True):
        chosen = [cell for cell in summaries if (cell["model"], cell["workload"]) == (model, workload)]
        chosen.sort(key=lambda cell: cell["rewards_per_second"]["median"])
        rates = [cell["rewards_per_second"] for cell in chosen]
        names = [cell["contender"] for cell in chosen]
        error = [
            [rate["median"] - rate["low"] for rate in rates],
            [rate["high"] - rate["median"] for rate in rates],
        ]
        colours = [_OURS_COLOUR if name in {OURS, OVER_HTTP} else _OTHERS_COLOUR for name in names]
        axis.barh(names, [rate["median"] for rate in rates], xerr=error, color=colours, height=0.7)
        axis.set_title(f"{model}, {workload}: rewards per second", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write_between_markers(page: Path, text: str) -> None:
    """Replaces the text between the markers of a page.

    Raises:
        ValueError: The page lacks a marker.
    """
    before, found, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"{page} lacks the line {BEGIN!r} or, after it, {END!r}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def _spread(values: Sequence[float]) -> Spread:
    spread = Spread.of(values)
    assert spread is not None
    return spread


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,.3g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _times(cell: dict[str, Any]) -> str:
    return Spread(**cell["ours_times"]).text(".2f", "x") if cell["ours_times"] else ""


def _difference(cell: dict[str, Any]) -> str:
    if cell["difference"] is None:
        return ""
    scale = "" if cell["deviation"] is None else f" of {cell['deviation']:.1g}"
    return f"{cell['difference']:.1g}{scale}"
