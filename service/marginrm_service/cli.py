"""The commands `marginrm serve`, whose options are the fields of `Settings`, and `marginrm key`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from marginrm.errors import ConfigError
from marginrm_service.settings import Option, Settings


def serve(**given: Any) -> None:
    """Serve reward models over HTTP.

    The page at the address that it prints compares two responses and ranks several; POST /score and POST /best-of-n
    do the same for programs, and /docs describes them. Each option can be given as an environment variable instead:
    MARGINRM_PORT for --port, MARGINRM_MODELS for --model (with commas between), and so on.

    For example:

      marginrm serve checkpoints/demo

      marginrm serve small=runs/a large=org/name --port 9000

      marginrm serve runs/rm-70b --upstream vllm=http://10.0.0.7:8000
    """
    given["models"] = [*(given.pop("paths") or []), *(given["models"] or [])]
    settings = settings_of(given)
    if not settings.models:
        raise ConfigError(
            "No model to serve. Give one: `marginrm serve PATH`, a folder that `marginrm train` wrote or any "
            "Hugging Face reward model. `marginrm demo` makes a small one in checkpoints/demo."
        )
    from marginrm_service.server import run  # torch is not needed to print the help

    run(settings)


def settings_of(options: Mapping[str, Any]) -> Settings:
    """Returns the settings for the options that were given; the others come from the environment.

    Raises:
        ConfigError: A value is not acceptable.
    """
    return Settings.load(**{name: value for name, value in options.items() if value != []})  # [] is an option not given


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Returns the parameter from which typer makes the option of a setting. Its default, None, leaves the setting out."""
    option = next((entry for entry in field.metadata if isinstance(entry, Option)), Option())
    kind: Any = list[str] if name in ("models", "upstreams") else field.annotation
    described = typer.Option(
        *(option.names or ("--" + name.replace("_", "-"),)),
        metavar=option.metavar,
        help=field.description,
        show_default=option.default or _shown(field.default),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, described]
    )


def _shown(default: Any) -> str | bool:
    """Returns a default as the help shows it; False for flags and for an empty default."""
    if not default:
        return False
    return f"{default:g}" if isinstance(default, float) else str(default)


_PATHS = typer.Argument(metavar="[NAME=]PATH", help="Models to serve, beside those of --model.", show_default=False)
serve.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # read by typer
    [
        inspect.Parameter(
            "paths", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, _PATHS]
        ),
        *(_parameter(name, field) for name, field in Settings.model_fields.items()),
    ]
)


def key(
    name: Annotated[str, typer.Argument(help="Owner of the key, as the file and the log name it.")],
    file: Annotated[Path, typer.Option("--file", "-f", help="Key file to add it to; created if it is missing.")],
) -> None:
    """Make an API key: prints it once, and adds its hash to a key file that a running server reads again by itself.

    Serve with `marginrm serve --key-file FILE`. To revoke a key, delete its line.
    """
    from marginrm_service.keys import add_key

    typer.echo(add_key(file, name))
