"""`python -m benchmarks.training.speed`: training pairs per second, by preset and beside TRL's `RewardTrainer`.

All contenders are interleaved in one run. They start from the same weights and receive the same token ids, batches, order
and optimiser settings, so in float32 the loss curves of `bt` and TRL must agree; the report states their difference.
Presets differ in the loss only, a small part of a step that rates of whole steps cannot resolve; it is timed separately.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.command import DataFolder, all_known, app_of
from benchmarks.harness.rates import Spread, ratios
from benchmarks.harness.texts import Sample, TokenizedGroup, load_texts, shared_prefix
from benchmarks.harness.worker_process import Timed, WorkerProcess
from benchmarks.harness.workloads import WORKLOADS, Samples
from benchmarks.models import MINILM, NAMES, build
from marginrm_training.method.losses import preference_losses
from marginrm_training.method.margins import Reference, named, target_margins

SHORT, LONG = "short prompts", "prompt two thirds"
_LONGEST = 256  # tokens of a sequence before its prompt is lengthened
_BASE, _TRL = "bt", "TRL"
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Trainer:
    """One contender.

    Attributes:
        kind: Its module under `benchmarks`.
        python: Its interpreter.
        options: The options that it is loaded with.
    """

    kind: str
    python: Path
    options: Mapping[str, Any]


def main(
    trl_python: Annotated[
        Path | None,
        typer.Option(help="Interpreter of an environment with trl, datasets and psutil; without it, TRL is left out."),
    ] = None,
    presets: Annotated[str, typer.Option(help="Comma-separated; bt is always included.")] = "bt,margin",
    models: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(NAMES)}.")] = "minilm,pythia-70m",
    dtypes: Annotated[str, typer.Option(help="Comma-separated: float32, bfloat16.")] = "float32,bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Samples that each contender trains on.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Steps in a sample.")] = 4,
    batch: Annotated[int, typer.Option(min=8, help="Pairs in a step, in one forward pass.")] = 16,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of a model to train in place of the built ones, on short prompts.")
    ] = None,
    longest: Annotated[
        int, typer.Option(min=64, help="Most tokens of a sequence, before prompts are lengthened.")
    ] = 256,
    data: DataFolder = None,
    output: Annotated[Path, typer.Option(help="Folder for models and results.")] = Path("runs/training_speed"),
) -> None:
    """Compare the training speed of marginrm's presets, and of TRL, on this machine."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    output.mkdir(parents=True, exist_ok=True)
    texts = load_texts(data)
    methods = dict.fromkeys((_BASE, *presets.split(",")))
    contenders = {
        name: trainer
        for dtype in all_known(dtypes, ("float32", "bfloat16"))
        for name, trainer in trainers(methods, dtype, batch, trl_python).items()
    }
    loss_only = loss_seconds(methods, batch)
    results = []
    folders = {folder.name: folder} if folder else {}
    for name in () if folder else all_known(models, NAMES):
        folders[name] = build(name, output / "models", texts.for_tokenizer)
    for name, start in folders.items():
        size = steps * batch
        short = list(islice(short_pairs(Samples(start, texts), longest), (rounds + 1) * size))
        # An encoder shares no prompt, and longer prompts do not fit MiniLM.
        workloads = {SHORT: short} if folder or name == MINILM else {SHORT: short, LONG: list(lengthened(short))}
        for workload, pairs in workloads.items():
            samples = [Sample(tuple(pairs[start : start + size])) for start in range(0, len(pairs), size)]
            found = interleave(start, samples, contenders).summary()
            results.append({"model": name, "workload": workload} | found | {"loss_seconds": loss_only})
            (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            typer.echo(json.dumps(results[-1]), err=True)
    tables = markdown(results, texts.source, batch)
    (output / "report.md").write_text(tables + "\n", encoding="utf-8")
    typer.echo(tables)


def short_pairs(samples: Samples, longest: int = _LONGEST) -> Iterator[TokenizedGroup]:
    """Yields pairs of at most so many tokens a sequence."""
    number = 0
    while True:
        for group in samples.sample(WORKLOADS["pairs"], number).groups:
            if max(map(len, group.ids)) <= longest:
                yield group
        number += 1


def lengthened(pairs: Sequence[TokenizedGroup]) -> Iterator[TokenizedGroup]:
    """Yields the pairs with tokens of other pairs before each prompt, so that two thirds of the tokens are a prompt."""
    for number, pair in enumerate(pairs):
        prompt = shared_prefix(pair.ids)
        response = sum(len(ids) - prompt for ids in pair.ids) / 2
        missing = max(round(2 * response) - prompt, 0)
        filler: tuple[int, ...] = ()
        for other in [*pairs[number + 1 :], *pairs]:
            if len(filler) >= missing:
                break
            filler += other.ids[0]
        yield replace(pair, ids=tuple(filler[:missing] + ids for ids in pair.ids))


def trainers(presets: Iterable[str], dtype: str, batch: int, trl_python: Path | None) -> dict[str, Trainer]:
    """Returns the contenders of one dtype by name: one for each preset, and TRL if there is an interpreter for it."""
    common = {"dtype": dtype, "batch": batch}
    own = Path(sys.executable)
    found = {
        _ours(preset, dtype): Trainer("training.marginrm_trainer", own, common | {"preset": preset})
        for preset in presets
    }
    if trl_python is not None:
        found[f"{_TRL}, {dtype}"] = Trainer("training.trl_trainer", trl_python, common)
    return found


@dataclass(slots=True)
class Record:
    """Measurements of all contenders on the same samples.

    Attributes:
        rates: Pairs per second by contender and round; round 0 is the warm-up and has none.
        losses: Losses of the steps of round 0, in which all contenders start from the same weights.
        peak_mib: Peak memory in addition to the loaded model; on a GPU, all that torch held there.
        tokens: Tokens computed over tokens requested, in the last round.
        gpu: Whether the contenders computed on a GPU.
        rounds: Number of rounds after the warm-up.
    """

    rates: dict[str, dict[int, float]]
    losses: dict[str, list[float]] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    gpu: bool = False
    rounds: int = 0

    def add(self, name: str, number: int, sample: Sample, timed: Timed, loaded_rss: int) -> None:
        """Adds one run of a contender."""
        if not number:
            self.losses[name] = timed.values
            return
        self.rounds = number
        self.rates[name][number] = len(sample.groups) / timed.seconds
        self.gpu = timed.gpu_peak is not None
        held = timed.gpu_peak or timed.peak_rss - loaded_rss
        self.peak_mib[name] = max(self.peak_mib.get(name, 0.0), held / _MIB)
        if timed.computed is not None:
            self.tokens[name] = timed.computed / sample.tokens

    def summary(self) -> dict[str, Any]:
        """Returns everything as plain values.

        Returns:
            `pairs_per_second` and `ratios` to `reference` (spreads as dicts), which is TRL's faster dtype, or without TRL
            the faster `bt`; `costs`: the time of a step over that of a `bt` step of the same dtype; `loss_difference`: the
            largest between the float32 loss curves of `bt` and TRL; and the fields of this record.
        """
        medians = {name: median(values.values()) for name, values in self.rates.items()}
        peers = [name for name in self.rates if name.startswith(_TRL)] or [
            name for name in self.rates if _is_base(name)
        ]
        reference = max(peers, key=lambda name: medians[name])
        exact = [self.losses.get(name, []) for name in (_ours(_BASE, "float32"), f"{_TRL}, float32")]
        return {
            "pairs_per_second": {name: _fields(list(values.values())) for name, values in self.rates.items()},
            "reference": reference,
            "ratios": {name: _fields(ratios(values, self.rates[reference])) for name, values in self.rates.items()},
            "costs": {
                name: _fields(ratios(self.rates[_ours(_BASE, name.rsplit(", ", 1)[1])], values))
                for name, values in self.rates.items()
                if not name.startswith(_TRL) and not _is_base(name)
            },
            "loss_difference": max(abs(a - b) for a, b in zip(*exact, strict=True)) if all(exact) else None,
            "peak_mib": self.peak_mib,
            "gpu": self.gpu,
            "tokens": self.tokens,
            "rounds": self.rounds,
        }


def interleave(folder: Path, samples: Sequence[Sample], contenders: Mapping[str, Trainer]) -> Record:
    """Trains all contenders on the same samples, one after another, in another order each round.

    Args:
        folder: The model that each starts from.
        samples: One for the warm-up and one for each round.
        contenders: The contenders by name.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    record = Record({name: {} for name in contenders})
    with ExitStack() as running:
        processes = {}
        for name, trainer in contenders.items():
            processes[name] = running.enter_context(WorkerProcess(trainer.kind, trainer.python, threads))
            processes[name].load(folder, trainer.options)
        names = list(contenders)
        for number, sample in enumerate(samples):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                record.add(name, number, sample, processes[name].run(sample), processes[name].loaded_rss)
    return record


def loss_seconds(presets: Iterable[str], pairs: int, calls: int = 1000) -> dict[str, float]:
    """Returns the median seconds of what differs by preset: target margins, and the loss with its gradient."""
    d = torch.randn(pairs, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reference, strengths = Reference.of(d), torch.full((pairs,), 0.8)
    durations: dict[str, list[float]] = {preset: [] for preset in presets}
    for _ in range(calls):
        for preset, times in durations.items():
            method = named(preset)
            started = time.perf_counter()
            targets = target_margins(method, d, reference, strengths)
            torch.autograd.grad(preference_losses(method, d, targets, smoothing=0.0).mean(), d)
            times.append(time.perf_counter() - started)
    return {preset: median(times) for preset, times in durations.items()}


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
            ratio = Spread(**result["ratios"][name]).text(".2f")
            tokens = f"{result['tokens'][name]:.0%}" if name in result["tokens"] else ""
            cost = Spread(**result["costs"][name]).text(".3f") if name in result["costs"] else ""
            lines.append(
                f"| {name} | {rate['median']:.1f} | {ratio} | {cost} | {result['peak_mib'][name]:,.0f} MiB | {tokens} |"
            )
        step = batch / max(rate["median"] for name, rate in result["pairs_per_second"].items() if _is_base(name))
        lines += ["", f"The loss alone, of a `bt` step's {step:.2f} s: {_losses(result['loss_seconds'], step)}."]
        if result["loss_difference"] is not None:
            lines += ["", f"Largest difference of the float32 loss curves: {result['loss_difference']:.1e}."]
    return "\n".join(lines)


def _losses(seconds: Mapping[str, float], step: float) -> str:
    parts = [f"`{_BASE}` {seconds[_BASE] * 1e6:.0f} us"]
    for preset, duration in seconds.items():
        if preset != _BASE:
            more = duration - seconds[_BASE]
            parts.append(f"`{preset}` {duration * 1e6:.0f} us ({more / step:+.4%} of the step)")
    return "; ".join(parts)


def _ours(preset: str, dtype: str) -> str:
    return f"marginrm {preset}, {dtype}"


def _is_base(name: str) -> bool:
    return name.startswith(_ours(_BASE, ""))


def _fields(values: Sequence[float]) -> dict[str, float]:
    spread = Spread.of(values)
    assert spread is not None
    return asdict(spread)


if __name__ == "__main__":
    app_of(main)()
