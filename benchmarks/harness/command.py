"""Command lines whose errors are one plain line: in a box a path is broken where the terminal's width ends."""

from __future__ import annotations

from collections.abc import Callable, Collection

import typer


def command_group(description: str | None = None) -> typer.Typer:
    """Returns an app without commands.

    Args:
        description: What its help says.
    """
    return typer.Typer(help=description, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def app_of(command: Callable[..., None]) -> typer.Typer:
    """Returns an app that is this one command."""
    app = command_group()
    app.command()(command)
    return app


def known(name: str, names: Collection[str]) -> str:
    """Returns a name that was given.

    Raises:
        BadParameter: It is none of those that there are.
    """
    if name not in names:
        raise typer.BadParameter(f"{name!r} is none of: {', '.join(names)}")
    return name
