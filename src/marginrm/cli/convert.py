"""`marginrm convert`: a checkpoint of another form as a plain folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A .gguf file, a folder or Hub name with .bin files, or a LoRA adapter.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the written weights.")] = "float32",
) -> None:
    """Write a checkpoint as a plain folder of safetensors, which `marginrm train` and `marginrm serve` take.

    GGUF is dequantised (needs the package gguf), .bin files are written as safetensors, and a LoRA adapter is merged into
    its base model (needs peft).
    """
    import torch

    from marginrm.loading.convert import convert as write

    kind = write(source, output, dtype=getattr(torch, dtype))
    typer.echo(f"{output}: {kind}, {dtype}")
