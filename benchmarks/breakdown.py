"""`python -m benchmarks.breakdown`: the time of marginrm's forward passes by kind of operator."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.command import DataFolder, all_known, app_of, known
from benchmarks.harness.rates import gemm_share
from benchmarks.harness.texts import load_texts
from benchmarks.harness.workloads import WORKLOADS, Samples
from benchmarks.models import NAMES, build
from benchmarks.throughput.scorers.in_process import InProcess

# Parts of operator names by kind; all other operators are elementwise: norms, rotary embedding, gates, sums.
_KINDS = {
    "attention": ("attention", "attend", "bmm", "softmax"),  # only attention uses batched products
    "matrix products": ("mm", "linear", "gemm", "matmul"),
    "copies (gathers, casts)": ("index", "gather", "cat", "copy", "clone", "contiguous", "embedding"),
}
_REST = "elementwise"
KINDS = (*_KINDS, _REST)
_COMPILED = "## Call CompiledFxGraph"  # its own time is that of the fused kernels; a hash follows


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "qwen3-0.6b",
    workloads: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(WORKLOADS)}.")
    ] = "bon-long,bon-short,pairs",
    compiled: Annotated[bool, typer.Option("--compiled", help="With operators between products compiled.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="In deterministic mode.")] = False,
    whole_last_layer: Annotated[
        bool, typer.Option("--whole-last-layer", help="Compute the last layer for every token.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    data: DataFolder = None,
    output: Annotated[Path, typer.Option(help="Folder of the models.")] = Path("runs/bench"),
) -> None:
    """Profile one sample of each workload and print a table of shares."""
    texts = load_texts(data)
    folder = build(known(model, NAMES), output / "models", texts.for_tokenizer)
    samples = Samples(folder, texts)
    ours = InProcess(
        folder, device=device, compiled=compiled, deterministic=deterministic, whole_last_layer=whole_last_layer
    )
    typer.echo(
        f"{model}, {ours.detail['dtype']}, {torch.get_num_threads()} threads, steps of {ours.detail['token_budget']:,}"
    )
    typer.echo(f"\n| workload | seconds | of the GEMM rate | {' | '.join(KINDS)} |")
    typer.echo(f"|---|---:|---:|{'---:|' * len(KINDS)}")
    for name in all_known(workloads, WORKLOADS):
        ours.run(ours.prepare(samples.sample(WORKLOADS[name], 0)))  # warm-up
        work = ours.prepare(samples.sample(WORKLOADS[name], 1))
        started = time.perf_counter()
        ours.run(work)
        seconds = time.perf_counter() - started
        gemm = gemm_share(ours.detail["linear_computed"], ours.computed or 0, seconds, ours.gemm_rate())
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        with profile(activities=activities) as profiler:
            ours.run(work)
        events = profiler.key_averages()
        times = ((e.key, e.self_device_time_total if device == "cuda" else e.self_cpu_time_total) for e in events)
        shares = by_kind(times)
        cells = " | ".join(f"{shares[kind]:.0%}" for kind in KINDS)
        typer.echo(f"| {name} | {seconds:.2f} | {gemm:.0%} | {cells} |")


def by_kind(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Returns each kind's share of the time.

    Args:
        times: Names of operators and their own time, without that of the operators they call.
    """
    found: dict[str, float] = defaultdict(float)
    for name, taken in times:
        found[_kind(name)] += taken
    whole = sum(found.values()) or 1.0
    return {kind: found[kind] / whole for kind in KINDS}


def _kind(name: str) -> str:
    if name.startswith(_COMPILED):
        return _REST
    return next((kind for kind, parts in _KINDS.items() if any(part in name.lower() for part in parts)), _REST)


if __name__ == "__main__":
    app_of(main)()
