"""Command lines of the benchmarks: plain one-line errors (a rich box breaks long paths), shared options, checked names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated

import typer

DataFolder = Annotated[
    Path | None,
    typer.Option(
        envvar="MARGINRM_DATA", help="Folder with the AlpacaEval files; without it, texts of the demo generator."
    ),
]


def command_group(description: str | None = None) -> typer.Typer:
    """Returns an app without commands.

    Args:
        description: The text of its `--help`.
    """
    return typer.Typer(help=description, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def app_of(command: Callable[..., None]) -> typer.Typer:
    """Returns an app with this single command."""
    app = command_group()
    app.command()(command)
    return app


def known(name: str, names: Collection[str]) -> str:
    """Returns a name that the user gave.

    Raises:
        BadParameter: The name is unknown.
    """
    if name not in names:
        raise typer.BadParameter(f"{name!r} is not one of: {', '.join(names)}")
    return name


def all_known(listed: str, names: Collection[str]) -> list[str]:
    """Returns the names of a comma-separated list. Raises as `known` does."""
    return [known(name, names) for name in listed.split(",") if name]
