"""`python -m benchmarks.training.speed`: pairs per second in training, by preset and beside TRL's `RewardTrainer`.

All contenders take turns in one run, start from the same weights and are given the same token ids, batches, order and
optimiser settings; so in float32 the loss curves of `bt` and TRL must agree, and the report says by how much they do not.
Presets differ in nothing but the loss, which is too little beside a step to be seen in rates; it is timed on its own too.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.command import app_of
from benchmarks.harness.groups import Group
from benchmarks.harness.rates import Spread, ratios
from benchmarks.harness.texts import ALPACA, load_texts
from benchmarks.harness.worker_process import ContenderProcess
from benchmarks.harness.workloads import WORKLOADS, Portions
from benchmarks.models import MINILM, NAMES, build
from benchmarks.throughput.studies import shared_prefix
from marginrm_training.method.losses import preference_losses
from marginrm_training.method.margins import Reference, named, target_margins

_LONGEST = 256  # tokens of a sequence as it comes, in both workloads
SHORT, LONG = "short prompts", "prompt two thirds"
_BASE, _TRL = "bt", "TRL"
_MIB = 2**20


def main(
    trl_python: Annotated[
        Path | None, typer.Option(help="Interpreter of an environment with trl, datasets and psutil; without, no TRL.")
    ] = None,
    presets: Annotated[str, typer.Option(help="With commas between; bt is always one of them.")] = "bt,margin",
    models: Annotated[str, typer.Option(help=f"With commas between: {', '.join(NAMES)}.")] = "minilm,pythia-70m",
    dtypes: Annotated[str, typer.Option(help="With commas between: float32, bfloat16.")] = "float32,bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="How often each contender trains on a portion.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Steps in a portion.")] = 4,
    batch: Annotated[int, typer.Option(min=8, help="Pairs in a step, in one forward pass.")] = 16,
    data: Annotated[Path, typer.Option(help="Folder of the AlpacaEval files; without them the demo's texts.")] = ALPACA,
    output: Annotated[Path, typer.Option(help="Folder for models and results.")] = Path("runs/training_speed"),
) -> None:
    """Compare the training speed of marginrm's presets, and of TRL, on this machine."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    texts = load_texts(data)
    methods = dict.fromkeys((_BASE, *presets.split(",")))
    entrants = {
        name: entrant
        for dtype in dtypes.split(",")
        for name, entrant in _entrants(methods, dtype, batch, trl_python).items()
    }
    alone = loss_seconds(methods, batch)
    results = []
    for name in models.split(","):
        folder = build(name, output / "models", texts.passages[:4000])
        short = list(islice(short_pairs(Portions(folder, texts)), rounds * steps * batch + steps * batch))
        # An encoder shares no prompt, and MiniLM has no room for longer ones.
        workloads = {SHORT: short} if name == MINILM else {SHORT: short, LONG: list(lengthened(short))}
        for workload, groups in workloads.items():
            portions = [groups[start : start + steps * batch] for start in range(0, len(groups), steps * batch)]
            found = take_turns(folder, portions, entrants)
            results.append({"model": name, "workload": workload} | found | {"loss_seconds": alone})
            (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            typer.echo(json.dumps(results[-1]), err=True)
    tables = markdown(results, texts.source, batch)
    (output / "report.md").write_text(tables + "\n", encoding="utf-8")
    typer.echo(tables)


def short_pairs(portions: Portions) -> Iterator[Group]:
    """Yields pairs of at most 256 tokens a sequence."""
    number = 0
    while True:
        for group in portions.portion(WORKLOADS["pairs"], number):
            if max(map(len, group.ids)) <= _LONGEST:
                yield group
        number += 1


def lengthened(groups: Sequence[Group]) -> Iterator[Group]:
    """Yields pairs whose prompt is two thirds of their tokens: in front of each stands text of other pairs."""
    for number, group in enumerate(groups):
        prompt = shared_prefix(group.ids)
        response = sum(len(ids) - prompt for ids in group.ids) / 2
        missing = max(round(2 * response) - prompt, 0)
        filler: tuple[int, ...] = ()
        for other in [*groups[number + 1 :], *groups]:
            if len(filler) >= missing:
                break
            filler += other.ids[0]
        yield replace(group, ids=tuple(filler[:missing] + ids for ids in group.ids))


Trainer = tuple[str, Path, dict[str, Any]]


def _entrants(presets: Iterable[str], dtype: str, batch: int, trl_python: Path | None) -> dict[str, Trainer]:
    """Returns module, interpreter and options of each contender, by its name."""
    common = {"dtype": dtype, "batch": batch}
    own = Path(sys.executable)
    found: dict[str, Trainer] = {
        _ours(preset, dtype): ("training.marginrm_trainer", own, common | {"preset": preset}) for preset in presets
    }
    if trl_python is not None:
        found[f"{_TRL}, {dtype}"] = ("training.trl_trainer", trl_python, common)
    return found


def _ours(preset: str, dtype: str) -> str:
    return f"marginrm {preset}, {dtype}"


def take_turns(folder: Path, portions: Sequence[Sequence[Group]], entrants: Mapping[str, Trainer]) -> dict[str, Any]:
    """Lets all contenders train on the same portions, one after another, in another order each round.

    Returns:
        `pairs_per_second` and `ratios` to `reference` (`Spread`s as dicts), which is TRL's best dtype, or without TRL the
        faster `bt`; `costs`, the time of a step over a `bt` step of the same dtype; `peak_mib` over the loaded model (if
        on a `gpu`, all that torch held there), `tokens` computed over tokens asked, and `loss_difference`: the largest
        between two loss curves in float32 in the first round, when all start from the same weights.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    processes = {name: ContenderProcess(kind, python, threads) for name, (kind, python, _) in entrants.items()}
    rates: dict[str, dict[int, float]] = {name: {} for name in entrants}
    losses: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    computed: dict[str, float] = {}
    gpu = False
    try:
        for name, process in processes.items():
            process.load(folder, entrants[name][2])
        names = list(entrants)
        for number, portion in enumerate(portions):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                scored = processes[name].score(portion)
                losses.setdefault(name, scored.rewards)  # of the first round
                if number:  # the first one warms up
                    rates[name][number] = len(portion) / scored.seconds
                    gpu = scored.gpu_peak is not None
                    held = scored.gpu_peak or scored.peak_rss - processes[name].loaded_rss
                    peaks[name] = max(peaks.get(name, 0.0), held / _MIB)
                    if scored.computed is not None:
                        computed[name] = scored.computed / sum(group.tokens for group in portion)
    finally:
        for process in processes.values():
            process.close()
    return _summary(rates, losses) | {"peak_mib": peaks, "gpu": gpu, "tokens": computed, "rounds": len(portions) - 1}


def loss_seconds(presets: Iterable[str], pairs: int, calls: int = 1000) -> dict[str, float]:
    """Returns the median seconds of all that presets differ in: target margins, and the loss, forward and backward."""
    d = torch.randn(pairs, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reference, strengths = Reference.of(d), torch.full((pairs,), 0.8)
    taken: dict[str, list[float]] = {preset: [] for preset in presets}
    for _ in range(calls):
        for preset, times in taken.items():
            method = named(preset)
            started = time.perf_counter()
            targets = target_margins(method, d, reference, strengths)
            torch.autograd.grad(preference_losses(method, d, targets, smoothing=0.0).mean(), d)
            times.append(time.perf_counter() - started)
    return {preset: median(times) for preset, times in taken.items()}


def _summary(rates: dict[str, dict[int, float]], losses: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: median(values.values()) for name, values in rates.items()}
    peers = [name for name in rates if name.startswith(_TRL)] or [name for name in rates if _is_base(name)]
    reference = max(peers, key=lambda name: medians[name])
    exact = [_ours(_BASE, "float32"), f"{_TRL}, float32"]
    return {
        "pairs_per_second": {name: _fields(list(values.values())) for name, values in rates.items()},
        "reference": reference,
        "ratios": {name: _fields(ratios(values, rates[reference])) for name, values in rates.items()},
        "costs": {
            name: _fields(ratios(rates[_ours(_BASE, name.rsplit(", ", 1)[1])], values))
            for name, values in rates.items()
            if not name.startswith(_TRL) and not _is_base(name)
        },
        "loss_difference": max(abs(a - b) for a, b in zip(*(losses[name] for name in exact), strict=True))
        if all(name in losses for name in exact)
        else None,
    }


def _fields(values: Sequence[float]) -> dict[str, float]:
    spread = Spread.of(values)
    assert spread is not None
    return {"median": spread.median, "low": spread.low, "high": spread.high}


def markdown(results: Sequence[dict[str, Any]], source: str, batch: int) -> str:
    """Returns the results as tables."""
    lines = [f"Texts: {source}; {batch} pairs a step; medians (lowest to highest round)."]
    for result in results:
        memory = "peak memory on the GPU" if result["gpu"] else "peak memory over the model"
        lines += [
            "",
            f"**{result['model']}, {result['workload']}**, {result['rounds']} rounds",
            "",
            f"| | pairs/s | times {result['reference']} | time of a step over that of bt | {memory} | tokens computed |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, rate in result["pairs_per_second"].items():
            ratio = result["ratios"][name]
            tokens = f"{result['tokens'][name]:.0%}" if name in result["tokens"] else ""
            cost = _spread(result["costs"][name], 3) if name in result["costs"] else ""
            lines.append(
                f"| {name} | {rate['median']:.1f} | {_spread(ratio, 2)} | {cost} | "
                f"{result['peak_mib'][name]:,.0f} MiB | {tokens} |"
            )
        step = batch / max(rate["median"] for name, rate in result["pairs_per_second"].items() if _is_base(name))
        lines += ["", f"The loss alone, of a `bt` step's {step:.2f} s: {_losses(result['loss_seconds'], step)}."]
        if result["loss_difference"] is not None:
            lines += ["", f"Largest difference of the float32 loss curves: {result['loss_difference']:.1e}."]
    return "\n".join(lines)


def _losses(seconds: Mapping[str, float], step: float) -> str:
    told = [f"`{_BASE}` {seconds[_BASE] * 1e6:.0f} us"]
    for preset, taken in seconds.items():
        if preset != _BASE:
            more = taken - seconds[_BASE]
            told.append(f"`{preset}` {taken * 1e6:.0f} us ({more / step:+.4%} of the step)")
    return "; ".join(told)


def _is_base(name: str) -> bool:
    return name.startswith(_ours(_BASE, ""))


def _spread(fields: dict[str, float], places: int) -> str:
    return f"{fields['median']:.{places}f} ({fields['low']:.{places}f} to {fields['high']:.{places}f})"


if __name__ == "__main__":
    app_of(main)()
