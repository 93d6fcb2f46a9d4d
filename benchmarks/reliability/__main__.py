"""`python -m benchmarks.reliability RUN`; each run writes JSON and its section of docs/reliability.md."""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks.harness.command import command_group
from benchmarks.reliability.report import Report, markdown, write
from benchmarks.reliability.server import WORK

app = command_group(__doc__)
Minutes = Annotated[float, typer.Option(min=0.1, help="Duration.")]


@app.command()
def overload(
    minutes: Minutes = 5.0,
    times: Annotated[float, typer.Option(help="Load as a multiple of the capacity.")] = 3.0,
    deadline: Annotated[float, typer.Option(help="Seconds within which a reply must arrive.")] = 10.0,
) -> None:
    """Load the server beyond its capacity."""
    from benchmarks.reliability.overload import overload as run

    _finish(run(minutes, times, deadline), "overload")


@app.command()
def soak(minutes: Minutes = 30.0) -> None:
    """Load the server at 80% of its capacity, swap models, and send disturbing requests."""
    from benchmarks.reliability.soak import soak as run

    _finish(run(minutes), "soak")


@app.command()
def crowded(
    candidates: Annotated[int, typer.Option(min=100, help="Candidates of the huge request.")] = 10_000,
    pairs: Annotated[int, typer.Option(min=20, help="Pairs on the idle server.")] = 200,
) -> None:
    """Time lone pairs beside a huge request."""
    from benchmarks.reliability.crowded import crowded as run

    _finish(run(candidates, pairs), "crowded")


@app.command()
def lengths(passes: Annotated[int, typer.Option(min=20, help="Forward passes of each kind.")] = 200) -> None:
    """Compare forward passes over rows of few and of many lengths."""
    from benchmarks.reliability.lengths import lengths as run

    _finish(run(passes), "lengths")


@app.command()
def sigterm(times: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 20) -> None:
    """Send SIGTERM to the server under load."""
    from benchmarks.reliability.sigterm import sigterm as run

    _finish(run(times), "sigterm")


@app.command()
def fuzz(requests: Annotated[int, typer.Option(min=3, help="Requests, of three kinds.")] = 21_000) -> None:
    """Send generated invalid requests."""
    from benchmarks.reliability.fuzz import fuzz as run

    _finish(run(requests), "fuzz")


def _finish(report: Report, key: str) -> None:
    write(report, key, WORK)
    typer.echo(markdown(report))
    raise typer.Exit(not report.passed)


if __name__ == "__main__":
    app()
