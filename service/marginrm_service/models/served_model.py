"""A model that is being served: its weights, its engine, its door, and what it says of itself."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from marginrm.encoding import Encoder
from marginrm.schemas import ModelCard, ModelInfo
from marginrm_service.engine.admission import Admission, Permit
from marginrm_service.engine.coalescing import Reuse
from marginrm_service.engine.engine import ScoringEngine, StepReport
from marginrm_service.engine.job import Job
from marginrm_service.engine.queue import QUANTA_PER_STEP
from marginrm_service.engine.reward_cache import RewardCache
from marginrm_service.errors import OverloadedError
from marginrm_service.telemetry.metrics import Metrics

if TYPE_CHECKING:  # torch takes seconds to import; the server listens before that
    from marginrm.reward_model import RewardModel

_TICKS = 10
_SMOOTHING = 0.1  # weight of the newest request in characters per token


class ServedModel:
    """One loaded model with its engine. Belongs to the event loop.

    Args:
        model: The loaded reward model.
        metrics: Where to count.
        max_queue_tokens: The most tokens that may wait.
        max_queue_requests: The most requests that may wait.
        reward_cache_bytes: Memory for rewards that were given; 0 computes each anew, equal ones in flight too.
        stall_seconds: The longest that a step should take.
        golden: Largest difference to a golden reward at load; None without golden samples.
        folder: The checkpoint, if it is a local folder.
    """

    def __init__(
        self,
        model: RewardModel,
        metrics: Metrics,
        *,
        max_queue_tokens: int,
        max_queue_requests: int,
        reward_cache_bytes: int,
        stall_seconds: float,
        golden: float | None = None,
        folder: Path | None = None,
    ) -> None:
        self.info: ModelInfo = model.info
        self.manifest = model.manifest
        self.golden = golden
        self.folder = folder
        self.encoder: Encoder = model.encoder
        self.shares_prefixes: bool = model.shares_prefixes
        self.token_budget: int = model.token_budget
        calibration = model.manifest.calibration if model.manifest else None
        self.margin_quantiles: Mapping[str, float] = calibration.margin_quantiles if calibration else {}
        self._model = model
        self._metrics = metrics
        self._stall_seconds = stall_seconds
        self._created = int(time.time())
        self._turn = max(model.token_budget // QUANTA_PER_STEP, 1)
        self._door = Admission(max_tokens=max_queue_tokens, max_requests=max_queue_requests, turn=self._turn)
        self._engine = ScoringEngine(model, name=model.info.name, on_step=self._measure)
        self._cache = RewardCache(reward_cache_bytes)
        self._reuse = Reuse(self._cache) if reward_cache_bytes else None
        self._characters_per_token = 4.0

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.info.name

    @property
    def alive(self) -> bool:
        """Whether its worker takes jobs."""
        return self._engine.alive

    @property
    def died(self) -> bool:
        """Whether its worker ended without being told to."""
        return self._engine.died

    @property
    def reuses(self) -> bool:
        """Whether it looks for what need not be computed again, by the `places` of jobs."""
        return self._reuse is not None

    @property
    def stalled(self) -> bool:
        """Whether its present step has been running for longer than any should."""
        return self._engine.step_seconds > self._stall_seconds

    def start(self) -> None:
        """Starts the worker on the running event loop."""
        self._engine.start()

    async def close(self, drain_seconds: float) -> None:
        """Finishes what was accepted, as far as the time allows, and ends the worker."""
        await self._engine.close(drain_seconds)

    async def retire(self, drain_seconds: float) -> None:
        """Finishes what was accepted once no new request can come, and ends the worker."""
        for _ in range(_TICKS):  # a request that has just looked this model up enters in the next turns of the loop
            await asyncio.sleep(0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                await self._door.empty.wait()
        await self.close(drain_seconds)

    def admit(self, characters: int, seconds: float = math.inf, *, bulk: bool = False) -> Permit:
        """Lets a request in, by what its characters will probably cost in tokens.

        Args:
            characters: To be computed.
            seconds: Until its deadline.
            bulk: Whether it takes the room that interactive work leaves.

        Raises:
            OverloadedError: There is no room now, or its answer would be late.
        """
        expected = min(int(characters / self._characters_per_token), self._door.max_tokens)
        try:
            return self._door.enter(expected, seconds, bulk=bulk)
        except OverloadedError as error:
            self._metrics.rejections.labels(self.name, error.code).inc()
            raise

    def check_room(self, size: int, seconds: float, *, bulk: bool) -> None:
        """Returns if a request may find room, as far as the size of its body tells.

        Only half of the tokens that a text of this size would be are counted, and at most one turn: a request is refused
        by its size when the queue is full to within a moment's work, and else by what its texts cost.

        Args:
            size: Of the body, in bytes; 0 if it is not known.
            seconds: Until the request's deadline.
            bulk: Whether it takes the room that interactive work leaves.

        Raises:
            OverloadedError: There is no room now, or its answer would be late.
        """
        least = min(int(size / self._characters_per_token / 2), self._turn, self._door.max_tokens)
        self._door.check(least, seconds, bulk=bulk)

    def learn(self, characters: int, tokens: int) -> None:
        """Takes note of what some characters really cost in tokens."""
        if characters and tokens:
            self._characters_per_token += _SMOOTHING * (characters / tokens - self._characters_per_token)

    async def run(self, job: Job, permit: Permit | None = None) -> None:
        """Computes a job, apart from what need not be computed again.

        Args:
            job: What is asked.
            permit: Its place inside, which is settled for what is left to compute.

        Raises:
            RequestTooLargeError, EngineStoppedError: As `Permit.settle` and `ScoringEngine.run` do.
        """

        async def compute(part: Job) -> None:
            if permit:
                permit.settle(part.cost)
            await self._engine.run(part)

        if self._reuse and job.places:
            self._metrics.reused(self.name, await self._reuse.run(job, compute))
        else:
            await compute(job)

    def card(self) -> ModelCard:
        """Returns what `/v1/models` says of it."""
        return ModelCard(
            **self.info.model_dump(),
            id=self.name,
            created=self._created,
            forward_path="packed" if self._model.forward_path == "packed" else "padded",
            forward_reason=self._model.forward_reason,
            max_length=self.encoder.max_length,
        )

    def refresh_gauges(self) -> None:
        """Puts the queue's present state into the metrics."""
        self._metrics.queue_tokens.labels(self.name).set(self._door.tokens)
        self._metrics.queue_requests.labels(self.name).set(self._door.requests)
        self._metrics.reward_cache_bytes.labels(self.name).set(self._cache.size)

    def _measure(self, report: StepReport) -> None:
        self._door.measured(report.computed, report.seconds, started=report.started)
        self._metrics.step(self.name, report)
