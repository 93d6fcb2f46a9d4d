"""`python -m benchmarks.reliability`: overload, soak, crowded, lengths, sigterm, fuzz. Each writes JSON and its part of the page."""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks.harness.command import command_group
from benchmarks.reliability import page, setup
from benchmarks.reliability.checks import Report

app = command_group(__doc__)
Minutes = Annotated[float, typer.Option(min=0.1, help="How long.")]


@app.command()
def overload(
    minutes: Minutes = 5.0,
    times: Annotated[float, typer.Option(help="Load as a multiple of the capacity.")] = 3.0,
    deadline: Annotated[float, typer.Option(help="Seconds within which an answer must come.")] = 10.0,
) -> None:
    """Load the server beyond its capacity."""
    from benchmarks.reliability.overload import overload as run

    _finish(run(minutes, times, deadline), "overload")


@app.command()
def soak(minutes: Minutes = 30.0) -> None:
    """Load the server at 80% of its capacity, swap models, and misbehave."""
    from benchmarks.reliability.soak import soak as run

    _finish(run(minutes), "soak")


@app.command()
def crowded(
    candidates: Annotated[int, typer.Option(min=100, help="Of the huge request.")] = 10_000,
    pairs: Annotated[int, typer.Option(min=20, help="Timed on the idle server.")] = 200,
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
def sigterm(times: Annotated[int, typer.Option(min=1, help="How often.")] = 20) -> None:
    """End the server under load."""
    from benchmarks.reliability.sigterm import sigterm as run

    _finish(run(times), "sigterm")


@app.command()
def fuzz(requests: Annotated[int, typer.Option(min=3, help="How many, of three kinds.")] = 21_000) -> None:
    """Send the server generated nonsense."""
    from benchmarks.reliability.fuzz import fuzz as run

    _finish(run(requests), "fuzz")


def _finish(report: Report, key: str) -> None:
    page.write(report, key, setup.WORK)
    typer.echo(page.markdown(report))
    raise typer.Exit(not report.passed)


if __name__ == "__main__":
    app()
