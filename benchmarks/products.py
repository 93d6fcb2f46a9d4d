"""`python -m benchmarks.products`: rates of products with packed weights, by oneDNN and by the kernel for matrix tiles."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from benchmarks.harness.command import app_of
from marginrm.allocator import keep_memory
from marginrm.amx.kernels import KernelUnavailableError, load_kernels, supported
from marginrm.tuning.packed_weights import packed_weight, product, shape_of
from marginrm.tuning.timing import timed

_LAYERS = 8  # of a shape, so that a core's own caches do not hold their weights, as in a forward pass
_QWEN3 = "1024x2048,1024x1024,2048x1024,1024x3072,3072x1024"  # Qwen3-0.6B: queries, keys, output, gate, down


def main(
    shapes: Annotated[str, typer.Option(help="Input and output sizes of weights; by default Qwen3-0.6B's.")] = _QWEN3,
    rows: Annotated[str, typer.Option(help="Numbers of rows.")] = "8,64,256,1152,4096",
    rounds: Annotated[int, typer.Option(help="Runs of each product; the median counts.", min=1)] = 9,
    threads: Annotated[int | None, typer.Option(help="Threads; by default torch's.", min=1)] = None,
) -> None:
    """Print TFLOP/s of both for each shape, timed in turn, and the median ratio of neighbouring runs."""
    keep_memory()
    if threads:
        torch.set_num_threads(threads)
    if not supported():
        raise typer.BadParameter("this processor has no matrix tiles (AMX), so there is nothing to compare")
    try:
        load_kernels()
    except KernelUnavailableError as error:
        raise typer.BadParameter(f"the kernel cannot be used: {error}") from error
    typer.echo(f"bfloat16, {torch.get_num_threads()} threads, medians of {rounds} runs in turn\n")
    typer.echo(
        "| rows | weights, in x out | oneDNN, TFLOP/s | tiles, TFLOP/s | tiles are |\n|---:|---:|---:|---:|---:|"
    )
    for shape in shapes.split(","):
        given, result = map(int, shape.split("x"))
        layers = [nn.Linear(given, result, bias=False, dtype=torch.bfloat16) for _ in range(_LAYERS)]
        forms = [[packed_weight(layer, tiled) for layer in layers] for tiled in ((), {shape_of(layers[0])})]
        for count in map(int, rows.split(",")):
            inputs = torch.randn(count, given).bfloat16()
            products = [partial(_products, form, inputs, result) for form in forms]
            with torch.inference_mode():
                seconds = [[timed(one) for one in products] for _ in range(rounds + 1)][1:]
            rates = [
                2e-12 * _LAYERS * count * given * result / statistics.median(times)
                for times in zip(*seconds, strict=True)
            ]
            ratio = statistics.median(first / second for first, second in seconds)
            typer.echo(f"| {count:,} | {given:,} x {result:,} | {rates[0]:.2f} | {rates[1]:.2f} | {ratio:.2f}x |")


def _products(weights: list[Tensor], inputs: Tensor, out_features: int) -> list[Tensor]:
    return [product(weight, None, inputs, out_features) for weight in weights]


if __name__ == "__main__":
    app_of(main)()
