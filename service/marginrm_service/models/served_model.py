"""A loaded model with its admission control, engine, reward cache and model card."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from marginrm.encoding import Encoder
from marginrm.schemas import ModelCard, ModelInfo, PrefixCacheInfo
from marginrm.steps import PrefixUse
from marginrm_service.engine.admission import Admission
from marginrm_service.engine.coalescing import Coalescer
from marginrm_service.engine.engine import ScoringEngine, StepReport
from marginrm_service.engine.queue import quantum
from marginrm_service.engine.reward_cache import RewardCache
from marginrm_service.errors import EngineStoppedError
from marginrm_service.models import compiling
from marginrm_service.settings import Settings
from marginrm_service.telemetry.metrics import Metrics
from marginrm_service.upstream.model import UpstreamModel
from marginrm_service.upstream.watch import watch

if TYPE_CHECKING:  # torch takes seconds to import; the server listens before that
    from marginrm.reward_model import RewardModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QueueState:
    """The present load of a model.

    Attributes:
        tokens: Tokens that wait or are computed.
        requests: Admitted requests.
        waiting_for_others: Admitted requests that hold no tokens: all that they lack is computed for another request.
        keys_in_flight: Distinct responses that are being computed; 0 if rewards are not reused.
        cache_bytes: Memory of the cached rewards.
        prefix_bytes: Memory of the kept prefixes.
    """

    tokens: int
    requests: int
    waiting_for_others: int
    keys_in_flight: int
    cache_bytes: int
    prefix_bytes: int


class ServedModel:
    """One loaded model with its engine. Belongs to the event loop.

    Args:
        model: The loaded reward model.
        settings: Limits of its queue, size of its reward cache, and the longest normal step.
        metrics: Where steps are recorded.
        golden: Largest difference of a golden reward at load; None without golden samples.
        folder: The checkpoint, if it is a local folder.

    Attributes:
        info: The model's part of replies.
        manifest: The record of its training, if its checkpoint has one.
        reading: What its checkpoint is and how it is read; None for a module in memory.
        encoder: Turns its texts into token ids.
        shares_prefixes: Whether the common prefix of a group is computed once.
        token_budget: The most tokens of a step.
        tells_familiarity: Whether its rewards carry their uncertainty and the familiarity of their texts.
        margin_quantiles: Quantiles of the calibration margins; empty without a calibration.
        admission: Its admission control.
        engine: Runs its jobs.
        coalescer: Rewards that are cached or being computed; None if the reward cache is off.
    """

    def __init__(
        self,
        model: RewardModel | UpstreamModel,
        settings: Settings,
        metrics: Metrics,
        *,
        golden: float | None = None,
        folder: Path | None = None,
    ) -> None:
        self.info: ModelInfo = model.info
        self.manifest = model.manifest
        self.reading = model.reading
        self.golden = golden
        self.folder = folder
        self.encoder: Encoder = model.encoder
        self.shares_prefixes: bool = model.shares_prefixes
        self.token_budget: int = model.token_budget
        self.tells_familiarity = bool(model.manifest and model.manifest.uncertainty and model.readout)
        calibration = model.manifest.calibration if model.manifest else None
        self.margin_quantiles: Mapping[str, float] = calibration.margin_quantiles if calibration else {}
        self.admission = Admission(
            max_tokens=settings.max_queue_tokens,
            max_requests=settings.max_queue_requests,
            quantum=quantum(model.token_budget),
        )
        self.engine = ScoringEngine(model, name=model.info.name, on_step=self._observe_step)
        cache_bytes = int(settings.reward_cache_mib * 2**20)
        self.coalescer = Coalescer(RewardCache(cache_bytes)) if cache_bytes else None
        self._model = model
        self._metrics = metrics
        self._stall_seconds = settings.stall_seconds
        self._created = int(time.time())
        self._upstream = model if isinstance(model, UpstreamModel) else None
        self._watching: asyncio.Task[None] | None = None
        self._compiling: asyncio.Task[None] | None = None
        self._prefix_use = PrefixUse()
        self._leases = 0
        self._unleased = asyncio.Event()
        self._unleased.set()

    @property
    def name(self) -> str:
        """The name that requests use."""
        return self.info.name

    @property
    def stalled(self) -> bool:
        """Whether the present step has been running for longer than a normal one."""
        return self.engine.step_seconds > self._stall_seconds

    @property
    def ready(self) -> bool:
        """Whether requests are welcome."""
        down = self._upstream is not None and self._upstream.reason_down is not None
        return self.engine.alive and not self.stalled and not down

    def check_upstream(self) -> None:
        """Returns if the server that computes the rewards may be used, or this one computes them.

        Raises:
            UpstreamUnavailableError: It may not; the message has the reason.
        """
        if self._upstream:
            self._upstream.check_available()

    def watch_upstream(self) -> None:
        """Checks the server that computes the rewards from now on, if there is one."""
        if self._upstream:
            self._watching = asyncio.create_task(watch(self._upstream))

    @contextlib.contextmanager
    def lease(self) -> Iterator[Self]:
        """Keeps the model in service for one request: `retire` waits until all leases have ended."""
        self._leases += 1
        self._unleased.clear()
        try:
            yield self
        finally:
            self._leases -= 1
            if not self._leases:
                self._unleased.set()

    async def retire(self, drain_seconds: float) -> None:
        """Ends the worker once all leases have ended, or the time is up. No new lease may be given out by then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                await self._unleased.wait()
        await self.close(drain_seconds)

    async def close(self, drain_seconds: float) -> None:
        """Ends compilation and the worker, once accepted jobs are finished or the time is up."""
        if self._compiling:
            self._compiling.cancel()
            await asyncio.wait([self._compiling])
        await self.engine.close(drain_seconds)
        if self._watching:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await asyncio.to_thread(self._model.close)

    @property
    def compiled(self) -> bool:
        """Whether its layers are compiled."""
        return self._model.compiled

    def compile_in_background(self, one_at_a_time: asyncio.Lock) -> None:
        """Compiles the layers while requests are answered, if that may pay. Log and card tell what became of it.

        Args:
            one_at_a_time: Held meanwhile, so that several models take one core at most.
        """
        self._compiling = asyncio.create_task(self._compile(one_at_a_time))

    async def _compile(self, one_at_a_time: asyncio.Lock) -> None:
        async with one_at_a_time:
            try:
                if isinstance(self._model, UpstreamModel) or not self._model.worth_compiling:
                    return
                _log.info("Model %r: compiling its layers in the background", self.name)
                choice = await compiling.compile_layers(self._model, self.engine)
            except EngineStoppedError:
                return
            except Exception:  # noqa: BLE001 - of any class, and the eager layers go on
                _log.exception("Model %r: compiling failed", self.name)
                return
        module = self._model.module
        module.execution = module.execution.because(choice.reason)
        _log.info("Model %r: %s", self.name, choice.reason)

    def cached_tokens(self, ids: NDArray[np.int32], tenant: str | None) -> int:
        """Returns how many first tokens of a sequence the prefix cache has, as `RewardModel.cached_tokens` does."""
        return self._model.cached_tokens(ids, tenant)

    def card(self) -> ModelCard:
        """Returns the model's entry in `/v1/models`."""
        return ModelCard(
            **self.info.model_dump(),
            id=self.name,
            created=self._created,
            forward_path=self._model.forward_path,
            forward_reason=self._model.forward_reason,
            max_length=self.encoder.max_length,
            prefix_cache=self._prefix_cache(),
        )

    def _prefix_cache(self) -> PrefixCacheInfo | None:
        kept, use = self._model.prefixes, self._prefix_use
        if kept is None:
            return None
        return PrefixCacheInfo(max_bytes=kept.max_bytes, bytes=kept.size, hits=use.hits, tokens_saved=use.tokens)

    def queue_state(self) -> QueueState:
        """Returns the present load."""
        permits = list(self.admission.permits)
        return QueueState(
            tokens=self.admission.tokens,
            requests=len(permits),
            waiting_for_others=sum(permit.tokens == 0 for permit in permits),
            keys_in_flight=self.coalescer.keys_in_flight if self.coalescer else 0,
            cache_bytes=self.coalescer.cache.size if self.coalescer else 0,
            prefix_bytes=self._model.prefixes.size if self._model.prefixes else 0,
        )

    def _observe_step(self, report: StepReport) -> None:
        self._prefix_use += report.prefixes
        self.admission.observe_step(report.computed, report.seconds, started=report.started)
        self._metrics.step_done(self.name, report)
