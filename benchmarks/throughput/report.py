"""Measurements -> Markdown tables, a JSON summary, and the part of a page between two markers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.rates import Spread
from benchmarks.throughput.contenders import OURS
from benchmarks.throughput.results import Results
from benchmarks.throughput.targets import findings, gemm_shares, speed_ratio

BEGIN = "<!-- results: begin; written by python -m benchmarks.run -->"
END = "<!-- results: end -->"
_MIB = 2**20


def cells(results: Results) -> list[dict[str, Any]]:
    """Returns one summary for each model, workload and contender."""
    keys = dict.fromkeys((m.model, m.workload, m.contender) for m in results.measurements)
    return [_cell(results, *key) for key in keys]


def _cell(results: Results, model: str, workload: str, contender: str) -> dict[str, Any]:
    found = [m for m in results.measurements if (m.model, m.workload, m.contender) == (model, workload, contender)]
    differences = [m.difference for m in found if m.difference is not None]
    return {
        "model": model,
        "workload": workload,
        "contender": contender,
        "rounds": len(found),
        "rewards_per_second": _spread([m.rate for m in found]),
        "tokens_per_second": median(m.tokens / m.seconds for m in found),
        "computed_share": _median(m.computed / m.tokens for m in found if m.computed),
        "gemm_share": _median(gemm_shares(results, model, workload, contender)),
        "peak_over_loaded_mib": max(m.peak_rss - m.loaded_rss for m in found) / _MIB,
        "peak_mib": max(m.peak_rss for m in found) / _MIB,
        "difference": max(differences, default=None),
        "deviation": _median(m.deviation for m in found if m.deviation),
        "ours_times": _spread_of(speed_ratio(results.measurements, model, workload, contender)),
        "others": max(m.others for m in found),
    }


def summary(results: Results) -> dict[str, Any]:
    """Returns everything as plain values for a JSON file."""
    return {
        "machine": results.machine,
        "cells": cells(results),
        "targets": [asdict(finding) | {"verdict": finding.verdict} for finding in findings(results)],
        "studies": [{"study": name, "model": model, **f} for (name, model), f in results.studies.items()],
        "contenders": [
            {"model": model, "contender": name, **detail} for (model, name), detail in results.details.items()
        ],
    }


def markdown(results: Results, source: str) -> str:
    """Returns the tables."""
    machine = results.machine
    place = f"{machine['processor']}, {machine['threads']} threads, {', '.join(machine['bf16']) or 'no bf16 units'}"
    lines = [
        f"Measured on {place}; torch {machine['torch']}, transformers {machine['transformers']}; texts: {source}.",
        "",
        "| target | at least, or at most | measured (lowest to highest round) | |",
        "|---|---:|---:|---|",
    ]
    lines += [f"| {f.text} | {f.bound:g} | {_text(f.found)} | {f.verdict} |" for f in findings(results)]
    summaries = cells(results)
    for model, workload in dict.fromkeys((cell["model"], cell["workload"]) for cell in summaries):
        chosen = [cell for cell in summaries if (cell["model"], cell["workload"]) == (model, workload)]
        lines += ["", f"**{model}, {workload}**", "", *_table(chosen)]
    for (name, model), finding in results.studies.items():
        lines += ["", f"**{name}, {model}**", "", "| | |", "|---|---:|"]
        lines += [f"| {key} | {_number(value)} |" for key, value in finding.items()]
    lines += ["", *_absent(results)]
    return "\n".join(lines).strip()


def _table(chosen: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| contender | rewards/s | tokens/s | computed / asked | GEMM share | MiB over loaded | differs by | marginrm is |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in sorted(chosen, key=lambda cell: cell["rewards_per_second"]["median"]):
        times = "" if cell["contender"] == OURS else _times(cell["ours_times"])
        lines.append(
            f"| {cell['contender']} | {_range(cell['rewards_per_second'])} | {cell['tokens_per_second']:,.0f} "
            f"| {_number(cell['computed_share'])} | {_percent(cell['gemm_share'])} "
            f"| {cell['peak_over_loaded_mib']:,.0f} | {_difference(cell)} | {times} |"
        )
    rounds, others = {cell["rounds"] for cell in chosen}, max(cell["others"] for cell in chosen)
    lines += ["", f"{min(rounds)} rounds; other processes used at most {others:.0%} of the cores meanwhile."]
    return lines


def _absent(results: Results) -> list[str]:
    failed = [(model, name) for (model, name), detail in results.details.items() if "error" in detail]
    return [f"- {name} could not take part with {model}." for model, name in failed]


def write_between_markers(page: Path, text: str) -> None:
    """Replaces what stands between the markers of a page.

    Raises:
        ValueError: The page lacks a marker.
    """
    before, found, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"{page} lacks the line {BEGIN!r} or, after it, {END!r}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return asdict(Spread(median(values), min(values), max(values), len(values)))


def _spread_of(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else asdict(spread)


def _text(spread: Spread | None) -> str:
    return "" if spread is None else _range(asdict(spread))


def _range(spread: dict[str, Any]) -> str:
    return f"{spread['median']:.3g} ({spread['low']:.3g} to {spread['high']:.3g})"


def _times(spread: dict[str, Any] | None) -> str:
    return "" if spread is None else f"{spread['median']:.2f}x ({spread['low']:.2f} to {spread['high']:.2f})"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,.3g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _difference(cell: dict[str, Any]) -> str:
    if cell["difference"] is None:
        return ""
    scale = "" if cell["deviation"] is None else f" of {cell['deviation']:.1g}"
    return f"{cell['difference']:.1g}{scale}"
