"""The library's own subcommand, `marginrm score`."""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from marginrm.errors import ConfigError
from marginrm.text import Dtype, Truncation


def score(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Rows to score; .gz is read, too.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.jsonl", help="One row per input row.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint folder or Hub name.")],
    truncation: Annotated[
        Truncation, typer.Option(help="For sequences over the limit: error, or cut the prompt.")
    ] = "error",
    tie_below: Annotated[float, typer.Option(min=0.5, max=0.999999, help="Less confidence than this is a tie.")] = 0.5,
    dtype: Annotated[Dtype, typer.Option(help="Of the backbone; the head is float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_length: Annotated[int | None, typer.Option(help="Most tokens a sequence may have.")] = None,
    token_budget: Annotated[int | None, typer.Option(min=1, help="Most tokens in one forward pass.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let code that comes with the checkpoint run.")] = False,
    restart: Annotated[bool, typer.Option(help="Replace OUT instead of continuing it.")] = False,
) -> None:
    """Score a file of pairs, single responses or groups; a run that was stopped continues where it was."""
    from tqdm import tqdm

    from marginrm.file_scoring import Summary, read_jobs, resume_point, score_jobs

    if output.suffix == ".gz":
        raise ConfigError(f"-o {output}: the output is written uncompressed, so that it can be continued.")
    if output.exists() and source.exists() and output.samefile(source):
        raise ConfigError(f"-o {output} is the input. Give another file.")
    total = sum(1 for _ in read_jobs(source))
    if not output.parent.is_dir():
        raise ConfigError(f"-o {output}: there is no folder {output.parent}.")

    from marginrm.reward_model import RewardModel

    loaded = RewardModel.from_pretrained(
        model,
        dtype=dtype,
        device=device,
        max_length=max_length,
        token_budget=token_budget,
        trust_remote_code=trust_remote_code,
    )
    loaded.verify_golden()
    if restart:
        output.unlink(missing_ok=True)
    summary = Summary(skipped=resume_point(read_jobs(source), output, loaded.info.revision))
    jobs = islice(read_jobs(source), summary.skipped, None)
    started = time.monotonic()
    with (
        output.open("a", encoding="utf-8") as file,
        tqdm(total=total, initial=summary.skipped, unit="row", desc="scoring") as bar,
    ):
        for row in score_jobs(loaded, jobs, truncation, tie_below, summary):
            file.write(json.dumps(row, allow_nan=False) + "\n")
            bar.update()
    for line in summary.lines(time.monotonic() - started):
        typer.echo(line)
