"""The command `marginrm`. Its subcommands come from the entry-point group `marginrm.commands`.

The library therefore imports neither the service nor the training package. A command whose package is not installed is
listed in the help with the extra that installs it.
"""

from __future__ import annotations

import errno
import functools
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any, NoReturn

import typer

from marginrm.allocator import keep_memory
from marginrm.errors import MarginRMError

GROUP = "marginrm.commands"
# Import package to the extra that installs its dependencies. The library's own commands load models, as the service does.
_EXTRAS = {"marginrm": "service", "marginrm_service": "service", "marginrm_training": "training"}
_OF_FILES = {  # errors of the system whose cause is a path, its rights or a full disk
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}
_WERE_FLAGS = {"--compile": "on"}  # each with the value that it stood for

_ORDER = (
    "serve",
    "key",
    "score",
    "inspect",
    "convert",
    "train",
    "evaluate",
    "calibrate",
    "compare",
    "best-of-n",
    "ablate",
    "audit",
    "demo",
    "rollout",
    "size",
)


def build_app(commands: Sequence[EntryPoint] | None = None) -> typer.Typer:
    """Builds the command with one subcommand per entry point.

    Args:
        commands: Entry points of the subcommands; by default those of the group `marginrm.commands`.
    """
    app = typer.Typer(
        name="marginrm",
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich would parse the square brackets of extras as markup
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Margin-aware reward models: train, calibrate, score and serve.",
    )
    app.callback(invoke_without_command=True)(_root)
    found = list(entry_points(group=GROUP)) if commands is None else list(commands)
    rank = {name: place for place, name in enumerate(_ORDER)}
    for entry in sorted(found, key=lambda entry: (rank.get(entry.name, len(rank)), entry.name)):
        _add(app, entry)
    return app


def main(argv: Sequence[str] | None = None, command: typer.Typer | None = None) -> NoReturn:
    """Runs the command and exits with 0 (done), 1 (an error, one line on stderr) or 2 (wrong usage).

    An error is one of marginrm, or one of the system about a file or a disk, whose text says enough to people.

    Args:
        argv: Arguments without the program's name; by default those of the process.
        command: The command to run; by default `app`.
    """
    arguments = with_values(sys.argv[1:] if argv is None else argv)
    keep_memory()
    debug = "--debug" in arguments  # accepted before and after the name of the subcommand
    try:
        (command or app)(args=[argument for argument in arguments if argument != "--debug"], prog_name="marginrm")
    except (MarginRMError, OSError) as error:
        known = isinstance(error, MarginRMError) or error.errno in _OF_FILES
        if debug or not known:
            traceback.print_exc()
        else:
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            sys.stderr.write(f"marginrm: error: {_text(error)}{notes}\n")
        sys.exit(1)
    sys.exit(0)


def _text(error: MarginRMError | OSError) -> str:
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename is not None else ""
        return f"{named}{error.strerror}. Give --debug to see where."
    return " ".join(str(error).split())


def with_values(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with a value behind each option that was a flag in version 0.1 and takes a value now."""
    given = list(arguments)
    for place, argument in enumerate(given):
        bare = place + 1 == len(given) or given[place + 1].startswith("-")
        if argument in _WERE_FLAGS and bare:
            given[place] = f"{argument}={_WERE_FLAGS[argument]}"
            sys.stderr.write(f"marginrm: {argument} without a value is read as {given[place]}\n")
    return given


def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    del debug  # read by main, which handles errors
    if show_version:
        typer.echo(f"marginrm {version('marginrm')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _add(app: typer.Typer, entry: EntryPoint) -> None:
    try:
        command = entry.load()
    except ImportError as error:
        command = _unavailable(entry, error)
        extra = _extra(entry)
        app.command(
            entry.name,
            help=f'(not installed: pip install "marginrm[{extra}]")',
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
            add_help_option=False,
        )(command)
        return
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=entry.name)
    else:
        app.command(entry.name)(_explaining_imports(command, entry))


def _explaining_imports(command: Callable[..., Any], entry: EntryPoint) -> Callable[..., Any]:
    """Wraps a command so that a module missing at run time, such as torch, is reported with its extra."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            raise _missing(entry, error) from error

    run.__signature__ = inspect.signature(command, eval_str=True)  # type: ignore[attr-defined]
    return run


def _unavailable(entry: EntryPoint, error: ImportError) -> Callable[..., None]:
    def command() -> None:
        raise _missing(entry, error) from error

    return command


def _extra(entry: EntryPoint) -> str:
    return _EXTRAS.get(entry.module.partition(".")[0], "service")


def _missing(entry: EntryPoint, error: ImportError) -> MarginRMError:
    return MarginRMError(
        f"`marginrm {entry.name}` needs {error.name or 'a package'}, which is not installed. "
        f'Run: pip install "marginrm[{_extra(entry)}]"'
    )


app = build_app()
