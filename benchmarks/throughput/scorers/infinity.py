"""Infinity's engine in process: `rerank` for all prompts concurrently."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from pathlib import Path
from typing import Any

from infinity_emb import AsyncEmbeddingEngine, EngineArgs

from benchmarks.harness.texts import Sample


class Infinity:
    """Reranks all groups concurrently, so that Infinity forms its own batches; raw scores."""

    def __init__(self, folder: Path, *, dtype: str) -> None:
        self._loop = asyncio.new_event_loop()
        arguments = EngineArgs(
            model_name_or_path=str(folder),
            engine="torch",
            device="cpu",
            dtype=dtype,
            batch_size=32,
            model_warmup=False,
            lengths_via_tokenize=True,
        )
        self._engine = AsyncEmbeddingEngine.from_args(arguments)
        self._loop.run_until_complete(self._engine.astart())
        self.detail: dict[str, Any] = {"dtype": dtype, "version": version("infinity-emb")}
        self.computed: int | None = None

    def prepare(self, sample: Sample) -> Sample:
        """Returns the sample: Infinity takes texts."""
        return sample

    def run(self, work: Sample) -> list[float]:
        """Reranks all groups."""
        return self._loop.run_until_complete(self._all(work))

    async def _all(self, sample: Sample) -> list[float]:
        calls = [
            self._engine.rerank(query=str(group.prompt), docs=list(group.responses), raw_scores=True)
            for group in sample.groups
        ]
        rewards = []
        for results, _ in await asyncio.gather(*calls):
            rewards += [float(result.relevance_score) for result in sorted(results, key=lambda result: result.index)]
        return rewards


load = Infinity
