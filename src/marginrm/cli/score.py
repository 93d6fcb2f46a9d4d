"""The command `marginrm score`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from marginrm.cli.reading import takes_reading
from marginrm.errors import ConfigError
from marginrm.reading import ReadingOptions
from marginrm.text import Dtype, Truncation


@takes_reading
def score(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="JSON Lines file of rows to score; gzip too.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.jsonl", help="One row per input row.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint folder or Hub name.")],
    reading: ReadingOptions,
    truncation: Annotated[
        Truncation, typer.Option(help="For sequences over the limit: error, or cut the prompt.")
    ] = "error",
    tie_below: Annotated[
        float, typer.Option(min=0.5, max=0.999999, help="Confidence below which a comparison is a tie.")
    ] = 0.5,
    dtype: Annotated[Dtype, typer.Option(help="dtype of the backbone; the head is always float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_length: Annotated[int | None, typer.Option(help="Most tokens a sequence may have.")] = None,
    token_budget: Annotated[int | None, typer.Option(min=1, help="Most tokens in one forward pass.")] = None,
    max_bad_rows: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Most rows of this run that cannot be scored; 0 stops at the first. Unset: any number, each with its "
            "error in the output.",
            show_default=False,
        ),
    ] = None,
    restart: Annotated[bool, typer.Option(help="Replace OUT instead of continuing it.")] = False,
) -> None:
    """Score a file of pairs, single responses or groups; a run that was stopped continues where it was."""
    from tqdm import tqdm

    from marginrm.file_scoring import InputFile, check_revision, resume, score_rows
    from marginrm.file_summary import Summary

    if output.suffix == ".gz":
        raise ConfigError(f"-o {output}: the output is written uncompressed, so that it can be continued.")
    if output.exists() and source.exists() and output.samefile(source):
        raise ConfigError(f"-o {output} is the input. Give another file.")
    if not output.parent.is_dir():
        raise ConfigError(f"-o {output}: there is no folder {output.parent}.")
    rows = InputFile(source)
    done, revision = (0, None) if restart else resume(rows, output)

    from marginrm.reward_model import RewardModel

    loaded = RewardModel.from_pretrained(
        model,
        dtype=dtype,
        device=device,
        max_length=max_length,
        token_budget=token_budget,
        reading=reading,
    )
    loaded.verify_golden()
    check_revision(output, revision, loaded.info.revision)
    if restart:
        output.unlink(missing_ok=True)
    summary = Summary(skipped=done, max_bad_rows=max_bad_rows)
    started = time.monotonic()
    with (
        output.open("a", encoding="utf-8") as file,
        tqdm(total=rows.size, initial=rows.position, unit="B", unit_scale=True, desc="scoring") as bar,
    ):
        for row in score_rows(loaded, rows, truncation, tie_below, summary):
            file.write(json.dumps(row, allow_nan=False) + "\n")
            bar.update(rows.position - bar.n)
            bar.set_postfix(rows=done + summary.rows, refresh=False)
    for line in summary.lines(time.monotonic() - started):
        typer.echo(line)
