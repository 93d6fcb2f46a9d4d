"""A run of `marginrm score`: input, model and options -> a file or a folder, its counts, and an order for labelling."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marginrm.bulk.folder import ShardFolder
from marginrm.bulk.lines_file import check_revision, resume
from marginrm.bulk.lock import locked
from marginrm.bulk.plan import Plan, plan_shards, read_shards
from marginrm.bulk.rows import InputRow, checked, parse_row, read_places
from marginrm.bulk.scoring import ModelOptions, RowOptions, score_rows
from marginrm.bulk.summary import Summary
from marginrm.bulk.tables import ColumnTypes, Format, dump, join_shards
from marginrm.bulk.workers import ShardScorer, Workers
from marginrm.progress import Progress
from marginrm.texts.places import count_rows

Tell = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is scored, and how.

    Attributes:
        places: Files, folders, globs and data sets.
        model: The model.
        rows: How rows are scored and written.
        max_bad_rows: Most rows that cannot be scored; None for any number.
        restart: Replace the output instead of continuing it.
    """

    places: Sequence[str]
    model: ModelOptions
    rows: RowOptions
    max_bad_rows: int | None = None
    restart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """The shards of a run.

    Attributes:
        form: Format of their files.
        rows: Rows of a shard.
        part: This process takes shards `part[0]`, `part[0] + part[1]`, ...; (0, 1) takes all.
        whole: Join them into one file at the end; None leaves them in their folder.
    """

    form: Format
    rows: int
    part: tuple[int, int] = (0, 1)
    whole: Path | None = None

    def mine(self, plan: Plan) -> range:
        """Returns the numbers of the shards that this process takes."""
        index, count = self.part
        return range(index, len(plan.sizes), count)


def score_to_file(run: Run, output: Path, tell: Tell) -> Summary:
    """Scores an input into one JSON Lines file, row by row.

    Args:
        run: The work.
        output: The file.
        tell: Gets sentences for people.

    Returns:
        The counts of all rows of the file, those of earlier runs included; responses and tokens are those of this run.

    Raises:
        ConfigError: The output belongs to other work.
        DataError: The input cannot be read, or more rows cannot be scored than allowed.
        ModelError: The model cannot be loaded.
    """
    rows: Iterator[InputRow] = map(parse_row, checked(read_places(run.places), " ".join(run.places)))
    summary = Summary(max_bad_rows=run.max_bad_rows)
    with ExitStack() as held:
        there = output.exists()
        if there:
            held.enter_context(locked(output, output))
        revision, rows = (None, rows) if run.restart else resume(rows, output, run.rows.column, summary)
        summary.check()
        model = run.model.load()
        check_revision(output, revision, model.info.revision)
        if run.restart:
            output.unlink(missing_ok=True)
        if run.restart or not there:  # it is made only now, so that a run that fails before leaves nothing
            held.enter_context(locked(output, output))
        done, total = summary.rows, count_rows(run.places)
        file = held.enter_context(output.open("a", encoding="utf-8", buffering=1))
        progress = held.enter_context(Progress("scoring", total, done))
        for row in score_rows(model, rows, run.rows, summary):
            file.write(dump(row) + "\n")
            progress.update(1)
    tell(f"{progress.rows:,} rows scored, {progress.rate:,.1f} rows/s ({done:,} were done before)")
    return summary


def score_in_shards(run: Run, sharding: Sharding, output: Path, workers: Callable[[], Workers], tell: Tell) -> Summary:
    """Scores an input into a folder of shards, and joins them into one file if asked to.

    Args:
        run: The work.
        sharding: The shards.
        output: Their folder.
        workers: Makes the processes that score, once the input is known to be readable.
        tell: Gets sentences for people.

    Returns:
        The counts of this process's shards, those of earlier runs included.

    Raises:
        ConfigError: The output belongs to other work, or a package is not installed.
        DataError: The input cannot be read, or more rows cannot be scored than allowed.
        ModelError: The model cannot be loaded.
    """
    types = ColumnTypes(run.rows.column or "") if sharding.form == "parquet" else None
    with Progress("reading") as reading:
        plan = plan_shards(run.places, sharding.rows, types, reading.update)
    run.rows.check_columns(plan.columns)
    folder = ShardFolder(output, sharding.form, _work(run, sharding, plan), restart=run.restart)
    done = folder.done()
    mine = sharding.mine(plan)
    summary = Summary(max_bad_rows=run.max_bad_rows)
    for number in sorted(done.keys() & set(mine)):
        summary.merge(done[number])
    summary.check()
    earlier, total = summary.rows, sum(plan.sizes[number] for number in mine)
    shards = read_shards(run.places, plan, set(mine) - done.keys())
    crew = workers()
    with ExitStack() as held:
        try:
            held.enter_context(folder.begin(crew.start(_with_dtype_of(folder, run.model)), sharding.part))
            with Progress("scoring", total, earlier) as progress:
                for scored in crew.run(shards, ShardScorer(run.rows, sharding.form, plan.schema)):
                    folder.write(scored.number, scored.content, scored.summary)
                    summary.merge(scored.summary)
                    progress.update(scored.summary.rows)
                    summary.check()
        finally:
            crew.stop()
        tell(f"{progress.rows:,} rows scored, {progress.rate:,.1f} rows/s ({earlier:,} were done before)")
        _finish(folder, sharding, plan, tell)
    return summary


def _finish(folder: ShardFolder, sharding: Sharding, plan: Plan, tell: Tell) -> None:
    """Joins the shards if all are there and one file is wanted."""
    missing = len(plan.sizes) - len(folder.done())
    if missing:
        tell(f"{missing:,} of {len(plan.sizes):,} shards are left to other processes")
        return
    folder.finish()
    if sharding.whole is not None:
        join_shards([folder.shard(number) for number in range(len(plan.sizes))], sharding.whole, sharding.form)
        folder.remove()


def _with_dtype_of(folder: ShardFolder, model: ModelOptions) -> ModelOptions:
    """Returns the options with the dtype of the shards that are there, where the user leaves it open."""
    known = folder.model
    return dataclasses.replace(model, dtype=known["dtype"]) if known and model.dtype == "auto" else model


def _work(run: Run, sharding: Sharding, plan: Plan) -> dict[str, Any]:
    """Returns what the shards depend on beside the model, as plain JSON values."""
    work: dict[str, Any] = {
        "input": {"rows": plan.rows, "sha256": plan.sha256},
        "options": {
            "truncation": run.rows.truncation,
            "tie_below": run.rows.tie_below,
            "score_column": run.rows.column,
            "max_length": run.model.max_length,
            "shard_rows": sharding.rows,
            "format": sharding.form,
            "reading": dataclasses.asdict(run.model.reading),
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(work))
    return plain
