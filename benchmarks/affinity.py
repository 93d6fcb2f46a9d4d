"""`python -m benchmarks.affinity`: tokens computed for each sample on Ray Serve, routed by prompt and by Ray's default.

The traffic is a trainer's: one sample in a request, 16 samples to a prompt, in random order within a batch of prompts.
Needs the extra `ray`. It starts a cluster on this machine, and replicas one after the other, which takes minutes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any, Self

import httpx
import typer
import yaml

from benchmarks.harness.command import DataFolder, app_of, known
from benchmarks.harness.texts import load_texts
from benchmarks.harness.worker_process import ROOT
from benchmarks.harness.workloads import Samples
from benchmarks.models import NAMES, build
from marginrm.errors import ConfigError
from marginrm.scrape import scrape

_SERVE = Path(sys.executable).with_name("serve")
_CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "marginrm_service.ray_serve.proxy.middleware"}
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
_PATIENCE = 900.0  # seconds for a cluster or a version to start
_ROUTERS = {
    "by prompt": "marginrm_service.ray_serve.router.PromptRouter",
    "Ray's default": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """The cost of one run: samples, tokens of their requests and computed for them, seconds, shares of the replicas."""

    samples: int
    asked: float
    computed: float
    seconds: float
    shares: Sequence[float]


class Cluster:
    """Ray Serve on this machine with the shipped configuration, another model and a fixed number of replicas."""

    def __init__(self, folder: Path, model: Path, replicas: int) -> None:
        self.replicas = replicas
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._values = yaml.safe_load((ROOT / "deploy/ray-serve/serve.yaml").read_text(encoding="utf-8"))
        self._values["http_options"] = {"host": "127.0.0.1", "port": int(self.url.rsplit(":", 1)[1])}
        application = self._values["applications"][0]
        application["args"] = {"models": str(model), "dtype": "float32", "token_budget": 4096}
        self._deployment: dict[str, Any] = application["deployments"][0]
        del self._deployment["autoscaling_config"]
        self._deployment |= {"num_replicas": replicas, "ray_actor_options": {"num_cpus": 1, "num_gpus": 0}}
        self._config, self._log = folder / "serve.yaml", folder / "serve.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, router: str) -> None:
        """Starts the cluster with a router, and returns when all replicas answer."""
        self.stop()
        self._deployment["request_router_config"] = {"request_router_class": router}
        self._config.write_text(yaml.safe_dump(self._values), encoding="utf-8")
        self._run()
        deadline = time.monotonic() + _PATIENCE
        while not self._ready():
            if self._process is not None and self._process.poll() is not None:
                self._run()  # Ray gives its own processes 30 s to start, which a busy machine may exceed
            if time.monotonic() > deadline:
                raise typer.BadParameter(f"Ray Serve did not start; see {self._log}")
            time.sleep(1)

    def _run(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [_SERVE, "run", self._config], stdout=log, stderr=log, env=os.environ | _QUIET | _CALLBACK
            )

    def _ready(self) -> bool:
        try:
            return len(self.metric("marginrm_ready")) == self.replicas
        except ConfigError:
            return False

    def metric(self, name: str) -> dict[str, float]:
        """Returns the values of a metric by replica, from one scrape."""
        return {s.labels["replica"]: s.value for s in scrape(self.url) if s.name == name}

    def stop(self) -> None:
        """Ends the cluster."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def traffic(samples: Samples, prompts: int, to_a_prompt: int, tokens: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Yields the requests of a batch of prompts in random order.

    Args:
        samples: The source of texts.
        prompts: Number of prompts.
        to_a_prompt: Samples of each prompt.
        tokens: Tokens of a prompt and of a response.
    """
    groups = [samples.long_group(*tokens, to_a_prompt, number) for number in range(prompts)]
    requests = [{"prompt": group.prompt, "response": text} for group in groups for text in group.responses]
    Random(0).shuffle(requests)
    yield from requests


async def send(url: str, requests: Sequence[dict[str, Any]], at_once: int) -> None:
    """Sends every request once, as slime does, so many at a time."""
    free = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits()) as client:

        async def one(request: dict[str, Any]) -> None:
            async with free:
                (await client.post("/slime", json=request)).raise_for_status()

        await asyncio.gather(*map(one, requests))


def measure(cluster: Cluster, requests: Sequence[dict[str, Any]], at_once: int) -> Measured:
    """Returns the cost of these requests."""
    names = "marginrm_tokens_asked_total", "marginrm_tokens_computed_total", "marginrm_step_responses_sum"
    before = [cluster.metric(name) for name in names]
    started = time.perf_counter()
    asyncio.run(send(cluster.url, requests, at_once))
    seconds = time.perf_counter() - started
    after = [cluster.metric(name) for name in names]
    asked, computed, responses = (
        {replica: value - was.get(replica, 0.0) for replica, value in now.items()}
        for was, now in zip(before, after, strict=True)
    )
    shares = sorted(value / len(requests) for value in responses.values())
    return Measured(len(requests), sum(asked.values()), sum(computed.values()), seconds, shares)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "tiny",
    replicas: Annotated[int, typer.Option(min=1, help="Replicas, one thread each.")] = 2,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of the batch.")] = 32,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each prompt.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 400,
    response_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response.")] = 64,
    at_once: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
    data: DataFolder = None,
    output: Annotated[Path, typer.Option(help="Folder of the model and of the log.")] = Path("runs/bench"),
) -> None:
    """Send the same traffic with both routers, and print tokens computed for each sample."""
    texts = load_texts(data)
    folder = build(known(model, NAMES), output / "models", texts.for_tokenizer).resolve()
    source = Samples(folder, texts)
    requests = list(traffic(source, prompts, samples, (prompt_tokens, response_tokens)))
    output.mkdir(parents=True, exist_ok=True)
    report: Callable[[str], None] = typer.echo
    report(f"{model}, {replicas} replicas, {prompts} prompts x {samples} samples, {at_once} requests in flight\n")
    report("| routing | tokens asked a sample | tokens computed a sample | samples/s | share of each replica |")
    report("|---|---:|---:|---:|---|")
    with Cluster(output, folder, replicas) as cluster:
        for name, router in _ROUTERS.items():
            cluster.start(router)
            found = measure(cluster, requests, at_once)
            shares = ", ".join(f"{share:.0%}" for share in found.shares)
            report(
                f"| {name} | {found.asked / found.samples:.0f} | {found.computed / found.samples:.0f} "
                f"| {found.samples / found.seconds:.1f} | {shares} |"
            )


if __name__ == "__main__":
    app_of(main)()
