"""The command `marginrm score`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from marginrm.cli.reading import takes_reading
from marginrm.errors import ConfigError
from marginrm.reading import ReadingOptions
from marginrm.text import Dtype, Truncation

_SHARDS = "Shards: all outputs but a single .jsonl file"
_CLUSTER = "Ray"
_ROWS_FAILED = 3  # exit status


@takes_reading
def score(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="IN...",
            help="Rows to score: .jsonl, .json, .csv or .parquet files (.gz too), folders or globs of them, or a data set "
            "(owner/name:split, or a folder that save_to_disk wrote).",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="One row per input row: OUT.jsonl, OUT.jsonl.gz, OUT.parquet, or a folder of shards (OUT/).",
            show_default=False,
        ),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint folder or Hub name.", show_default=False)],
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
    tensor_parallel: Annotated[
        int,
        typer.Option(min=1, help="Processes that share every layer, each on a GPU: for models that one does not hold."),
    ] = 1,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile the layers: faster for large models, half a minute at the first load."),
    ] = False,
    prefix_cache_mib: Annotated[
        float,
        typer.Option(
            min=0, help="MiB for keys and values of prompts, for input in which the rows of a prompt are far apart."
        ),
    ] = 0,
    max_bad_rows: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Most rows that cannot be scored, those of earlier runs included; 0 stops at the first. Unset: any "
            "number, each with its error in the output.",
            show_default=False,
        ),
    ] = None,
    keep_columns: Annotated[
        bool | None,
        typer.Option(
            "--keep-columns/--no-keep-columns",
            help="Keep the input's columns, with the result in one more. Unset: for all outputs but a single .jsonl file.",
            show_default=False,
        ),
    ] = None,
    score_column: Annotated[str, typer.Option(help="Name of the result's column.")] = "score",
    rank_by: Annotated[
        Literal["uncertainty"] | None,
        typer.Option(
            help="Also write OUT.by-uncertainty.jsonl: the pairs and groups in the order in which to label them, the "
            "least certain first.",
            show_default=False,
        ),
    ] = None,
    restart: Annotated[bool, typer.Option(help="Replace OUT instead of continuing it.")] = False,
    form: Annotated[
        Literal["jsonl", "jsonl.gz", "parquet"],
        typer.Option("--format", help="Format of the shards in a folder.", rich_help_panel=_SHARDS),
    ] = "jsonl",
    shard_rows: Annotated[
        int,
        typer.Option(
            min=1,
            help="Rows of a shard, which is computed, written and repeated as a whole. It ends with a prompt's last row.",
            rich_help_panel=_SHARDS,
        ),
    ] = 2048,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Take every N-th shard from the I-th on, I from 0: N processes of a batch system fill one folder.",
            show_default=False,
            rich_help_panel=_SHARDS,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Score on Ray: local starts a cluster here, auto joins the running one, or give an address.",
            show_default=False,
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    ray_actors: Annotated[
        str, typer.Option(metavar="MIN:MAX", help="Copies of the model.", rich_help_panel=_CLUSTER)
    ] = "1",
    ray_gpus: Annotated[
        float, typer.Option(min=0, help="GPUs of each copy, such as 0.5.", rich_help_panel=_CLUSTER)
    ] = 0,
    ray_cpus: Annotated[
        int, typer.Option(min=1, help="CPUs, and compute threads, of each copy.", rich_help_panel=_CLUSTER)
    ] = 1,
) -> None:
    """Score pairs, single responses or groups; a run that was stopped, or killed, continues where it was.

    Exit status: 0 if every row has a result, 3 if some have an error, 1 if the run ended early.
    """
    from marginrm.bulk.labelling import write_order
    from marginrm.bulk.output import Output
    from marginrm.bulk.run import Run, score_in_shards, score_to_file
    from marginrm.bulk.scoring import ModelOptions, RowOptions
    from marginrm.bulk.workers import ThisProcess, Workers

    if ray is not None and tensor_parallel > 1:
        raise ConfigError("--ray: each actor is one process. Leave out --tensor-parallel, or score without Ray.")
    out = Output.of(output, form, shard, sharded=ray is not None, restart=restart)
    out.check(source)
    kept = out.in_shards_only if keep_columns is None else keep_columns
    if out.form == "parquet" and not kept:
        raise ConfigError(
            "--no-keep-columns: a Parquet file has the input's columns. Write .jsonl or .jsonl.gz instead."
        )
    run = Run(
        places=source,
        model=ModelOptions(
            model=model,
            dtype=dtype,
            device=device,
            max_length=max_length,
            token_budget=token_budget,
            tensor_parallel=tensor_parallel,
            compiled=compiled,
            prefix_cache_mib=prefix_cache_mib,
            reading=reading,
        ),
        rows=RowOptions(truncation=truncation, tie_below=tie_below, column=score_column if kept else None),
        max_bad_rows=max_bad_rows,
        restart=restart,
    )

    def workers() -> Workers:
        if ray is None:
            return ThisProcess()
        from marginrm.bulk.ray_pool import RayOptions, RayPool

        low, high = RayOptions.bounds(ray_actors)
        return RayPool(RayOptions(address=ray, low=low, high=high, gpus=ray_gpus, cpus=ray_cpus))

    if out.shards is None:
        summary = score_to_file(run, out.path, typer.echo)
    else:
        summary = score_in_shards(run, out.sharding(shard_rows), out.shards, workers, typer.echo)
    for line in summary.lines():
        typer.echo(line)
    if rank_by and out.complete:
        ranked, others = write_order(out.path, run.rows.column, out.order)
        typer.echo(f"{out.order}: {ranked:,} rows by uncertainty; {others:,} rows have no confidence")
    if summary.failed:
        raise typer.Exit(_ROWS_FAILED)
