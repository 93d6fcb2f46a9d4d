"""The engine of one model: jobs in, rewards out, with one worker thread that runs a step whenever there is work.

There is no timer. While a forward pass runs, requests gather; when it ends, the next step takes what has gathered. So
an idle server answers at once, and a busy one fills its steps by itself.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from marginrm_service.engine.compute_thread import ComputeThread
from marginrm_service.engine.job import Job
from marginrm_service.engine.queue import FairQueue, Portion
from marginrm_service.engine.step import ForwardModel, StepOutcome, run_step
from marginrm_service.errors import EngineStoppedError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, for whoever measures.

    Attributes:
        responses: Responses that it scored.
        asked: Their tokens, each response with its whole prompt.
        computed: Tokens that the model computed.
        started: When it began, in seconds of `perf_counter`.
        seconds: How long the worker was at it.
        faults: Forward passes that raised or gave a reward that is no number.
    """

    responses: int
    asked: int
    computed: int
    started: float
    seconds: float
    faults: int


class ScoringEngine:
    """Runs jobs on one model.

    Create, start and close it on one event loop; `run` may be awaited by any number of tasks there.

    Args:
        model: What computes. Its `run_step` is called from the worker thread only.
        name: For the thread and the log.
        on_step: Called on the event loop after every step.
    """

    def __init__(
        self, model: ForwardModel, *, name: str = "default", on_step: Callable[[StepReport], None] | None = None
    ) -> None:
        self._model = model
        self._name = name
        self._on_step = on_step
        self._queue = FairQueue(model.token_budget)
        self._wake = threading.Condition()  # guards the queue and the flags
        self._closing = False
        self._failure: BaseException | None = None
        self._step_began: float | None = None
        self._unfinished: set[Job] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        self._thread = ComputeThread(self._work, f"engine-{name}")

    @property
    def alive(self) -> bool:
        """Whether the worker takes jobs."""
        return self._thread.is_alive() and not self._closing and self._failure is None

    @property
    def died(self) -> bool:
        """Whether the worker ended without being told to; it cannot be started again."""
        return self._failure is not None

    @property
    def step_seconds(self) -> float:
        """How long the present step has been running; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else perf_counter() - began

    def start(self) -> None:
        """Starts the worker; rewards are delivered on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def run(self, job: Job) -> None:
        """Queues a job and waits until every response of it has an outcome.

        If the waiting task is cancelled, what was not computed yet is dropped.

        Raises:
            EngineStoppedError: The worker has ended.
        """
        loop = asyncio.get_running_loop()
        job.done = loop.create_future()
        if not job.remaining:
            return
        with self._wake:
            if self._closing or self._failure is not None or not self._thread.is_alive():
                raise EngineStoppedError(f"The worker of model {self._name!r} has ended.")
            job.queued_at = perf_counter()
            self._queue.push(job)
            self._unfinished.add(job)
            self._wake.notify()
        try:
            await job.done
        finally:
            job.abandoned = True  # of no effect when it is complete
            self._unfinished.discard(job)

    async def close(self, drain_seconds: float | None = None) -> None:
        """Takes no more jobs, finishes those it has, and ends the worker.

        Args:
            drain_seconds: After this time the jobs that are left fail; without it they all finish.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        if not self._thread.ident:
            return
        try:
            async with asyncio.timeout(drain_seconds):
                await self._ended.wait()
        except TimeoutError:
            _log.warning("Model %s: %d requests were not finished in time", self._name, len(self._unfinished))
        self._fail_all("The server is leaving.")

    def _work(self) -> None:
        """The worker thread."""
        try:
            while portions := self._next_step():
                self._step_began = started = perf_counter()
                result = run_step(
                    self._model, [part.job.groups[part.group][part.start : part.stop] for part in portions]
                )
                self._step_began = None
                self._post(self._deliver, portions, result, started, perf_counter() - started)
        except BaseException as error:  # noqa: BLE001 - whatever ended it, nobody may wait for it
            _log.exception("Model %s: the worker has died", self._name)
            self._failure = error
            self._post(self._fail_all, "The model's worker has died.")
        finally:
            self._post(self._ended.set)

    def _next_step(self) -> list[Portion]:
        """Waits for work; returns nothing when there will be none any more."""
        with self._wake:
            while True:
                portions = self._queue.take()
                if portions or self._closing:
                    return portions
                self._wake.wait()

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits for rewards any more
            _log.debug("Model %s: the event loop was gone", self._name)

    def _deliver(self, portions: list[Portion], result: StepOutcome, started: float, seconds: float) -> None:
        """Hands a step's outcomes to their jobs, on the event loop."""
        finished = []
        seen: set[int] = set()
        asked = 0
        for part, outcomes, computed in zip(portions, result.outcomes, result.computed, strict=True):
            job = part.job
            job.record(part.group, part.start, outcomes)
            job.computed += computed
            if job.started_at is None:
                job.started_at = started
            if id(job) not in seen:
                seen.add(id(job))
                job.forward_seconds += seconds
            if job.on_computed:
                job.on_computed(computed)
            asked += sum(job.plans[part.group].lengths[part.start : part.stop])
            if not job.remaining:
                finished.append(job)
        for job in finished:
            if job.done and not job.done.done():
                job.done.set_result(None)
        if self._on_step:
            responses = sum(len(outcomes) for outcomes in result.outcomes)
            self._on_step(StepReport(responses, asked, sum(result.computed), started, seconds, result.faults))

    def _fail_all(self, reason: str) -> None:
        with self._wake:
            self._queue.clear()
        for job in list(self._unfinished):
            if job.done and not job.done.done():
                job.done.set_exception(EngineStoppedError(reason))
