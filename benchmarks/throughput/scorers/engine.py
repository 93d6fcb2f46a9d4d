"""The server's engine without HTTP: concurrent requests of one response each, coalesced into steps by its queue."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.harness.texts import Sample, TokenizedGroup
from benchmarks.throughput.scorers.classify_client import send_all
from benchmarks.throughput.scorers.in_process import InProcess
from marginrm.text import Dtype
from marginrm_service.engine.engine import ScoringEngine
from marginrm_service.engine.job import Job


class Engine(InProcess):
    """`ScoringEngine` on the model of `InProcess`; each group of a sample is one request."""

    def __init__(self, folder: Path, *, dtype: Dtype = "auto", device: str = "cpu") -> None:
        super().__init__(folder, dtype=dtype, device=device)
        self._loop = asyncio.new_event_loop()

    def run(self, work: Sample) -> list[float]:
        """Sends all requests, `clients` sequences at a time, and returns the rewards."""
        self.computed = 0
        self._last = work
        return self._loop.run_until_complete(self._send(work))

    async def _send(self, sample: Sample) -> list[float]:
        engine = ScoringEngine(self._model)
        engine.start()

        async def send(group: TokenizedGroup) -> list[float]:
            job = Job.of([self._encoded(group)], share_prefix=self._model.shares_prefixes)
            await engine.run(job)
            (outcomes,) = job.outcomes
            rewards = [outcome for outcome in outcomes if isinstance(outcome, float)]
            if len(rewards) < len(outcomes):
                raise RuntimeError(f"A request failed: {outcomes}")
            return rewards

        starts = range(0, len(sample.groups), sample.turns)
        sequences = [sample.groups[start : start + sample.turns] for start in starts]
        rewards = await send_all(sequences, send, sample.clients)
        await engine.close()
        return [reward for group in rewards for reward in group]


load = Engine
