"""The queueing model of `marginrm size` against a server, and a simulation of a fleet.

`python -m benchmarks.fleet measure` sends one real server Poisson traffic, beside the model. `python -m benchmarks.fleet
simulate` has 1 to 200 replicas, with routing by prompt and at random, and with scaling.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from benchmarks.harness.command import command_group
from benchmarks.harness.server import ServerProcess, marginrm_command
from benchmarks.harness.texts import load_texts
from benchmarks.models import build
from marginrm.figures.chart import Chart, linear, powers, row
from marginrm.sizing.fleet import FleetLoad, PromptTraffic, Routing, Scaling, simulate_fleet
from marginrm.sizing.replica import Replica, Traffic, simulate

app = command_group(__doc__)
WORK = Path("runs/fleet")
_STEP_TOKENS = 2_048
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "asks", "why", "bread", "rises")


@app.command()
def measure(
    model: Annotated[str, typer.Option(help="Shape of the model, as `benchmarks.run` names them.")] = "minilm-shape",
    seconds: Annotated[float, typer.Option(min=1, help="Seconds at each load.")] = 40.0,
    loads: Annotated[str, typer.Option(help="Shares of the measured capacity.")] = "0.3,0.5,0.7,0.85,0.95",
    output: Annotated[Path, typer.Option(help="Folder for model, log and results.")] = WORK,
) -> None:
    """Hold the queueing model against a real server.

    The capacity is measured first, with 64 requests at a time, after as many for warm-up. Then requests come at random
    times, at shares of it.
    """
    folder = build(model, output / "models", load_texts().for_tokenizer)
    command = marginrm_command(
        "--model", str(folder), "--reward-cache-mib", "0", "--token-budget", str(_STEP_TOKENS), "--log-level", "warning"
    )
    with ServerProcess(command, output / "server.log", ready="/readyz") as server:
        results = asyncio.run(_measured(server, seconds, [float(one) for one in loads.split(",")]))
    (output / "measure.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    typer.echo(_table(results))


@app.command(name="simulate")
def simulate_command(
    seconds: Annotated[float, typer.Option(min=10, help="Simulated seconds of each point.")] = 120.0,
    replicas: Annotated[str, typer.Option(help="Sizes of the fleet.")] = "1,8,40,200",
    rates: Annotated[str, typer.Option(help="Requests per second and replica.")] = "2,4,6,8,12,16,20,24",
    tokens_per_second: Annotated[float, typer.Option(help="Of one replica.")] = 8_000.0,
    cache_tokens: Annotated[float, typer.Option(help="Tokens of the prefix cache of a replica.")] = 60_000.0,
    output: Annotated[Path, typer.Option(help="Folder for the results and the figure.")] = WORK,
) -> None:
    """Simulate fleets under the traffic of RL trainers: one sample in a request, 16 samples of a prompt within 30 s."""
    output.mkdir(parents=True, exist_ok=True)
    spec = Replica(tokens_per_second=tokens_per_second, step_seconds=0.01, queue_tokens=100_000)
    points: list[dict[str, Any]] = []
    for size in map(int, replicas.split(",")):
        for rate in map(float, rates.split(",")):
            requests = PromptTraffic().requests(rate * size, seconds, seed=0)
            for routing in ("random", "affine"):
                load = simulate_fleet(requests, spec, size, routing=_routing(routing), cache_tokens=cache_tokens)
                points.append({"replicas": size, "rate": rate, "routing": routing} | _figures(load))
                typer.echo(json.dumps(points[-1]))
    scaling = _scaling(spec, cache_tokens)
    typer.echo(json.dumps(scaling))
    (output / "simulate.json").write_text(
        json.dumps({"points": points, "scaling": scaling}, indent=1), encoding="utf-8"
    )
    (output / "fleet.svg").write_text(_drawn(points), encoding="utf-8")
    typer.echo(f"{output / 'fleet.svg'}")


async def _measured(server: ServerProcess, seconds: float, loads: list[float]) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=httpx.Limits()) as client:
        await _saturated(client, generator, seconds / 2)
        before = {name: server.metric(f"marginrm_step_{name}_sum") for name in ("tokens", "responses")}
        lasted = await _saturated(client, generator, seconds / 2)
        tokens, responses = (server.metric(f"marginrm_step_{name}_sum") - before[name] for name in before)
        capacity, rate = responses / lasted, tokens / lasted
        alone = sorted([await _ask(client, _body(generator)) for _ in range(40)])[20]
        full = _STEP_TOKENS / rate
        # alone = fixed + tokens * (full - fixed) / full step's tokens
        share_of_full = tokens / responses / _STEP_TOKENS
        fixed = min(max(0.0, (alone - share_of_full * full) / (1 - share_of_full)), 0.9 * full)
        spec = Replica(tokens_per_second=rate, step_seconds=fixed, step_tokens=_STEP_TOKENS)
        found = []
        for share in loads:
            latencies = await _poisson(client, generator, share * capacity, seconds)
            modelled = simulate(spec, Traffic(tokens=tokens / responses), share * capacity)
            found.append(
                {"load": share, "rate": share * capacity, "requests": len(latencies)}
                | {f"p{q}": float(np.quantile(latencies, q / 100)) for q in (50, 99)}
                | {f"model_p{q}": modelled.quantile(q / 100) for q in (50, 99)}
            )
    return {"replica": asdict(spec), "tokens": tokens / responses, "capacity": capacity, "loads": found}


async def _saturated(client: httpx.AsyncClient, generator: np.random.Generator, seconds: float) -> float:
    """Keeps 64 requests in the server for some seconds; returns the seconds until all are answered."""
    started = time.monotonic()

    async def busy() -> None:
        while time.monotonic() < started + seconds:
            await _ask(client, _body(generator))

    await asyncio.gather(*(busy() for _ in range(64)))
    return time.monotonic() - started


async def _poisson(
    client: httpx.AsyncClient, generator: np.random.Generator, rate: float, seconds: float
) -> list[float]:
    """Sends requests at random times, whether earlier ones are answered or not; returns their latencies."""
    waiting: list[asyncio.Task[float]] = []
    moment = start = time.monotonic()
    while moment < start + seconds:
        await asyncio.sleep(max(0.0, moment - time.monotonic()))
        waiting.append(asyncio.create_task(_ask(client, _body(generator))))
        moment += generator.exponential(1 / rate)
    return list(await asyncio.gather(*waiting))


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> float:
    started = time.perf_counter()
    (await client.post("/score", json=body)).raise_for_status()
    return time.perf_counter() - started


def _body(generator: np.random.Generator) -> dict[str, Any]:
    length = min(int(generator.gamma(4.0, 30.0)) + 8, 250)
    words = " ".join(generator.choice(_WORDS, length))
    return {"items": [{"prompt": "Say something.", "response": words}]}


def _scaling(spec: Replica, cache_tokens: float) -> dict[str, Any]:
    """A load that grows tenfold at once: two replicas at the start, up to 40 by queued tokens."""
    quiet = PromptTraffic().requests(16, 120, seed=1)
    busy = [
        replace(one, time=one.time + 120, prompt=one.prompt + 10_000_000)
        for one in PromptTraffic().requests(160, 480, seed=2)
    ]
    rule = Scaling(least=2, most=40, target=2 * spec.step_tokens)
    load = simulate_fleet(quiet + busy, spec, 2, routing="affine", cache_tokens=cache_tokens, scaling=rule)
    return _figures(load) | {"replicas": load.replicas}


def _routing(name: str) -> Routing:
    return "affine" if name == "affine" else "random"


def _figures(load: FleetLoad) -> dict[str, float]:
    return {
        "p50": round(load.quantile(0.5), 3),
        "p99": round(load.quantile(0.99), 3),
        "rejected": round(load.rejected, 4),
        "tokens_computed": round(load.tokens_computed, 1),
    }


def _drawn(points: list[dict[str, Any]]) -> str:
    sizes = sorted({one["replicas"] for one in points})
    charts = []
    for size in sizes:
        here = [one for one in points if one["replicas"] == size]
        rates = sorted({one["rate"] for one in here})
        chart = Chart(
            f"{size} replica{'s' if size > 1 else ''}",
            linear("requests per second and replica", 0, max(rates)),
            powers("p99, seconds", [1, 2, 5, 10, 20, 50, 100, 200]),
        )
        for number, routing in enumerate(("random", "affine")):
            curve = [(one["rate"], max(1.0, one["p99"])) for one in here if one["routing"] == routing]
            chart.line(curve, f"c{number}", label=routing)
            for x, y in curve:
                chart.dot(x, y, f"c{number}", radius=2.5, title=f"{routing}, {x:g}/s: p99 {y:.2f} s")
        charts.append(chart)
    return row("p99 latency by load and routing", charts, standalone=True)


def _table(results: dict[str, Any]) -> str:
    replica = results["replica"]
    measured = (
        f"{replica['tokens_per_second']:,.0f} tokens/s, {1e3 * replica['step_seconds']:.1f} ms a step, "
        f"{results['tokens']:.0f} tokens a request, capacity {results['capacity']:.1f} requests/s"
    )
    lines = [
        measured,
        "",
        "| load | requests | p50 | p50, model | p99 | p99, model |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['load']:.0%} | {one['requests']} | {one['p50']:.3f} s | {one['model_p50']:.3f} s | {one['p99']:.3f} s | "
        f"{one['model_p99']:.3f} s |"
        for one in results["loads"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    app()
