"""`python -m benchmarks.trainer_step`: CPU time of a step of trainer traffic, by kind of operator.

A step has some samples of prompts whose keys and values are in the prefix cache. It runs on one thread and is timed in CPU
seconds, so other work on the machine disturbs it little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.breakdown import KINDS, by_kind
from benchmarks.harness.command import DataFolder, app_of, known
from benchmarks.harness.texts import load_texts
from benchmarks.models import NAMES, build
from marginrm import RewardModel
from marginrm.allocator import keep_memory
from marginrm.encoding import EncodedGroup, EncodedResponse
from marginrm.forward.execution import Attention
from marginrm.tuning.last_layer import layers_of

_PROMPT, _RESPONSE = 812, 137  # tokens, as in the workload `trainer` with its chat template
_STEPS = {
    "1 sample": (1, 1),
    "4 samples, 1 prompt": (4, 1),
    "8 samples, 1 prompt": (8, 1),
    "8 samples, 8 prompts": (8, 8),
}
_CACHE_MIB = 4_096
_Step = Callable[[], list[EncodedGroup]]


def main(
    model: Annotated[str, typer.Option(help=f"A decoder: one of {', '.join(NAMES)}.")] = "qwen3-0.6b",
    compiled: Annotated[bool, typer.Option("--compiled", help="With operators between products compiled.")] = False,
    rounds: Annotated[int, typer.Option(help="Runs of each step; the least time counts.", min=1)] = 5,
    data: DataFolder = None,
    output: Annotated[Path, typer.Option(help="Folder of the models.")] = Path("runs/bench"),
) -> None:
    """Print CPU seconds, rate of the matrix products and shares, with the attention taken at load and gathered."""
    keep_memory()
    torch.set_num_threads(1)
    folder = build(known(model, NAMES), output / "models", load_texts(data).for_tokenizer)
    scorer = RewardModel.from_pretrained(folder, dtype="bfloat16", compiled=compiled, prefix_cache_mib=_CACHE_MIB)
    module = scorer.module
    weights = sum(weight.numel() for layer in layers_of(module) for weight in layer.parameters() if weight.dim() == 2)
    # Packed weights are expanded from one number, and keep their shape.
    kinds: tuple[Attention, ...] = tuple(dict.fromkeys((module.execution.attention, "gathered")))
    typer.echo(f"{model}, bfloat16, 1 thread, {'compiled' if compiled else 'eager'}; {scorer.forward_reason}")
    typer.echo(f"\n| step | attention | tokens | CPU s | TFLOP/s of the products, all time | {' | '.join(KINDS)} |")
    typer.echo(f"|---|---|---:|---:|---:|{'---:|' * len(KINDS)}")
    steps = _steps(module.base.config.get_text_config().vocab_size)
    for name, step in steps.items():
        for _ in range(2):  # the second finds the prompts
            _run(scorer, step)
        best: dict[Attention, float] = {}
        for _ in range(rounds):
            for attention in kinds:
                module.execution = replace(module.execution, attention=attention)
                seconds, tokens = _run(scorer, step)
                best[attention] = min(seconds, best.get(attention, seconds))
        for attention, seconds in best.items():
            module.execution = replace(module.execution, attention=attention)
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                _run(scorer, step)
            shares = by_kind((event.key, event.self_cpu_time_total) for event in profiler.key_averages())
            cells = " | ".join(f"{shares[kind]:.0%}" for kind in KINDS)
            rate = 2 * weights * tokens / seconds / 1e12
            typer.echo(f"| {name} | {attention} | {tokens:,} | {seconds:.3f} | {rate:.2f} | {cells} |")


def _steps(vocabulary: int) -> dict[str, _Step]:
    """Returns functions that make the groups of a step, with new responses to the same prompts each time."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(5, vocabulary, _PROMPT, np.int32) for _ in range(8)]

    def groups(samples: int, different: int) -> list[EncodedGroup]:
        responses = [generator.integers(5, vocabulary, _RESPONSE, np.int32) for _ in range(samples)]
        return [
            [EncodedResponse(np.concatenate([prompts[number % different], response]))]
            for number, response in enumerate(responses)
        ]

    return {name: partial(groups, *sizes) for name, sizes in _STEPS.items()}


def _run(scorer: RewardModel, step: _Step) -> tuple[float, int]:
    """Runs a step; returns CPU seconds and tokens computed."""
    groups = step()
    started = time.process_time()
    result = scorer.run_step(groups, [""] * len(groups))
    return time.process_time() - started, sum(result.computed)


if __name__ == "__main__":
    app_of(main)()
