"""The command `marginrm size`: replicas for a load, from the measured rate of one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from marginrm.errors import ConfigError

if TYPE_CHECKING:
    from marginrm.sizing.replica import Load, Replica, Traffic

_RATES = "1000,100000,10000000"


@dataclass(frozen=True, slots=True)
class Fleet:
    """The replicas for one rate.

    Attributes:
        responses_per_minute: The rate.
        replicas: How many replicas, spare ones included.
        busy: Share of the time in which a step runs, with all of them serving.
        p50: Median latency in seconds, with all of them serving.
        p99: The latency in seconds that 99% of the requests stay below.
    """

    responses_per_minute: float
    replicas: int
    busy: float
    p50: float
    p99: float


def size(
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            help="Tokens that one replica computes per second when it is loaded; `python -m benchmarks.run` measures it.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(help="Mean tokens that are computed for a response; a shared prompt once.", show_default=False),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Take both from the metrics of a running server. Its steps so far must have been full, as under full load.",
            show_default=False,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MARGINRM_API_KEY", help="API key of that server, if it needs one.", show_default=False),
    ] = None,
    p99: Annotated[float, typer.Option(help="Seconds that 99% of the requests must stay below.")] = 2.0,
    responses_per_minute: Annotated[str, typer.Option(metavar="N,N,...", help="Rates to size for.")] = _RATES,
    responses: Annotated[int, typer.Option(min=1, help="Responses in a request.")] = 1,
    spread: Annotated[
        float, typer.Option(min=0, max=10, help="Standard deviation of a request's tokens over their mean.")
    ] = 0.5,
    step_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a step, as `marginrm serve --token-budget` sets it.")
    ] = 8_192,
    step_seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds of a full step that do not depend on its tokens. Unset: 0.005, or a tenth of the step if that is "
            "less.",
            show_default=False,
        ),
    ] = None,
    spare: Annotated[int, typer.Option(min=0, help="Replicas that may fail without breaking the p99.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say how many replicas a load needs.

    One replica's queue is simulated: requests come independently of each other, wait for the running step, and share
    the next one. The highest rate that keeps the p99 gives the number of replicas. docs/operations.md explains the model.
    """
    from marginrm.sizing.replica import STEP_SECONDS, Replica, Traffic, highest_rate

    _check({"--tokens-per-second": tokens_per_second, "--tokens": tokens, "--p99": p99})
    if url and not (tokens_per_second and tokens):
        measured_rate, measured_tokens = _measured(url, api_key)
        tokens_per_second = tokens_per_second or measured_rate
        tokens = tokens or measured_tokens
    if not tokens_per_second or not tokens:
        raise ConfigError("Give --tokens-per-second and --tokens, or the --url of a running server.")
    if step_seconds is None:
        step_seconds = min(STEP_SECONDS, 0.1 * step_tokens / tokens_per_second)
    replica = Replica(tokens_per_second=tokens_per_second, step_seconds=step_seconds, step_tokens=step_tokens)
    traffic = Traffic(tokens=tokens * responses, spread=spread)
    best = highest_rate(replica, traffic, p99)
    fleets = [_fleet(replica, traffic, best, rate, responses, spare) for rate in _rates(responses_per_minute)]
    if as_json:
        shown = asdict(replica) | {"responses_per_minute": best.rate * responses * 60}
        typer.echo(json.dumps({"replica": shown, "fleets": [asdict(fleet) for fleet in fleets]}, indent=2))
        return
    typer.echo(
        f"One replica: {tokens_per_second:,.0f} tokens/s, {tokens:,.0f} tokens a response. It keeps p99 below {p99:g} s up "
        f"to {best.rate * responses * 60:,.0f} responses a minute, {best.busy:.0%} busy.\n"
    )
    typer.echo(f"{'responses/min':>14}  {'replicas':>9}  {'busy':>5}  {'p50':>8}  {'p99':>8}")
    for one in fleets:
        typer.echo(
            f"{one.responses_per_minute:>14,.0f}  {one.replicas:>9,}  {one.busy:>5.0%}  {one.p50:>6.2f} s  {one.p99:>6.2f} s"
        )
    typer.echo(f"\nReplicas include {spare} spare. Busy, p50 and p99 are with all replicas serving.")


def _fleet(
    replica: Replica, traffic: Traffic, best: Load, responses_per_minute: float, responses: int, spare: int
) -> Fleet:
    from marginrm.sizing.replica import simulate

    rate = responses_per_minute / 60 / responses
    replicas = math.ceil(rate / best.rate) + spare
    load = simulate(replica, traffic, rate / replicas)
    return Fleet(responses_per_minute, replicas, load.busy, load.quantile(0.5), load.quantile(0.99))


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [0.0]
    if min(rates) <= 0 or not all(map(math.isfinite, rates)):
        raise ConfigError(f"--responses-per-minute {text!r} is not a list of numbers above 0, such as {_RATES}.")
    return rates


def _measured(url: str, api_key: str | None) -> tuple[float, float]:
    """Returns a server's tokens per second of its steps, and tokens per response, since it started.

    Raises:
        ConfigError: The server cannot be asked, or has computed nothing yet.
    """
    from marginrm.scrape import scrape

    samples = scrape(url, api_key)
    tokens, seconds, responses = (
        sum(sample.value for sample in samples if sample.name == f"marginrm_step_{name}_sum")
        for name in ("tokens", "seconds", "responses")
    )
    if not (tokens and seconds and responses):
        raise ConfigError(f"{url} has computed nothing yet. Send it the traffic that you expect, then ask again.")
    return tokens / seconds, tokens / responses


def _check(values: dict[str, float | None]) -> None:
    """Checks options that must be numbers above 0.

    Raises:
        ConfigError: One is not.
    """
    for option, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{option} {value:g}: give a number above 0.")
