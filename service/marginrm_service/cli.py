"""`marginrm serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from marginrm.errors import ConfigError

_SECURITY = "Needed by few checkpoints; runs code that comes with them, so only for those you trust."


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="[NAME=]PATH",
            help="Folder or Hugging Face Hub name of a reward model. Repeat it as NAME=PATH to serve several; requests "
            'choose one by {"model": NAME}.',
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.", show_default="8000")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the backbone; the head is float32 always. auto measures.", show_default="auto"),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile",
            help="Run what lies between matrix products through torch.compile: faster for large models, half a minute "
            "at the first start; needs g++ on CPUs.",
            show_default=False,
        ),
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic",
            help="Give a text the same reward to the bit whatever is scored beside it; slower, not with --compile.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="The most tokens a sequence may have.", show_default="the model's")
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(help="The most tokens of one forward pass: more is faster and takes memory.", show_default="auto"),
    ] = None,
    max_queue_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that may wait per model; beyond, 429 with Retry-After.", show_default="2000000"),
    ] = None,
    max_queue_requests: Annotated[
        int | None, typer.Option(help="Requests that may wait per model.", show_default="2048")
    ] = None,
    reward_cache_mib: Annotated[
        float | None,
        typer.Option(help="MiB of rewards to keep per model; 0 computes each anew.", show_default="64"),
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help="The largest request body; beyond, 413.", show_default="33554432")
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds for a request without X-Request-Timeout; beyond, 504.", show_default="120"),
    ] = None,
    max_request_timeout: Annotated[
        float | None, typer.Option(help="The most that X-Request-Timeout may ask for.", show_default="3600")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="API keys that are let in, as `marginrm key` makes them.", show_default="everybody is let in"
        ),
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys that may load, swap and unload models.", show_default="nobody may"),
    ] = None,
    rate_limit: Annotated[
        int | None, typer.Option(help="Requests a minute for each key; beyond, 429.", show_default="no limit")
    ] = None,
    drain_seconds: Annotated[
        float | None, typer.Option(help="Time to finish accepted requests after SIGTERM.", show_default="30")
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help=_SECURITY, show_default=False)
    ] = None,
    log_format: Annotated[
        Literal["text", "json"] | None, typer.Option(help="For people or for machines.", show_default="text")
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option(help="The least to log.", show_default="info")
    ] = None,
) -> None:
    """Serve reward models over HTTP.

    The page at the address that it prints compares two responses and ranks several; POST /score and POST /best-of-n
    do the same for programs, and /docs describes them. Each option can be given as an environment variable instead:
    MARGINRM_PORT for --port, MARGINRM_MODELS for --model (with commas between), and so on.

    Examples:
      marginrm serve --model checkpoints/demo

      marginrm serve --model small=runs/a --model large=org/name --port 9000
    """
    from marginrm_service.settings import Settings

    settings = Settings.load(
        models=model or None,
        host=host,
        port=port,
        dtype=dtype,
        compile=compile_,
        deterministic=deterministic,
        device=device,
        max_length=max_length,
        token_budget=token_budget,
        max_queue_tokens=max_queue_tokens,
        max_queue_requests=max_queue_requests,
        reward_cache_mib=reward_cache_mib,
        max_body_bytes=max_body_bytes,
        request_timeout=request_timeout,
        max_request_timeout=max_request_timeout,
        key_file=key_file,
        admin_key_file=admin_key_file,
        rate_limit=rate_limit,
        drain_seconds=drain_seconds,
        trust_remote_code=trust_remote_code,
        log_format=log_format,
        log_level=log_level,
    )
    if not settings.models:
        raise ConfigError(
            "No model to serve. Give one: `marginrm serve --model PATH`, a folder that `marginrm train` wrote or any "
            "Hugging Face reward model. `marginrm demo` makes a small one in checkpoints/demo."
        )
    from marginrm_service.server import run

    run(settings)


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is; the file and the log know it by this name.")],
    file: Annotated[Path, typer.Option("--file", "-f", help="Key file to add it to; made if it is missing.")],
) -> None:
    """Make an API key: prints it once, and adds its hash to a key file that a running server reads again by itself.

    Serve with `marginrm serve --key-file FILE`. To take a key back, delete its line.
    """
    from marginrm_service.keys import add_key

    typer.echo(add_key(file, name))
