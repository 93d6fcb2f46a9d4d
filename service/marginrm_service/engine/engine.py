"""The engine of one model: jobs in, rewards out, by one worker thread that runs a step whenever there is work.

While a forward pass runs, requests queue; when it ends, the next step takes what has arrived. So an idle server answers
at once, and a busy one fills its steps.

Trainers send their next request when they have the reply to the last one. So the next step waits for as many new jobs as
the last one completed, but no longer than a small part of that step's time. Otherwise the first request to come back could
run alone while the others are on their way, or two halves of the clients could take turns for ever. After a wait that
kept jobs and brought none, the next step goes without one; after several such waits in a row, up to 15 steps do.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

from marginrm.steps import PrefixUse
from marginrm_service.engine.compute_thread import ComputeThread
from marginrm_service.engine.job import Job
from marginrm_service.engine.queue import FairQueue, Step
from marginrm_service.engine.step import ForwardModel, StepOutcome, run_step
from marginrm_service.errors import EngineStoppedError, UnavailableError

_WAIT = 1 / 16  # of a step's time, for the requests that follow on its replies
_MOST_STEPS_WITHOUT = 15  # steps that do not wait, after several waits that kept jobs and brought none

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepReport:
    """The measures of one step.

    Attributes:
        responses: Responses that it scored.
        requested: Their tokens, each response with its whole prompt.
        computed: Tokens that the model computed.
        started: Its start, in seconds of `perf_counter`.
        seconds: Its duration.
        faults: Forward passes that raised or gave a reward that is not finite.
        prefixes: What was taken from the prefix cache.
    """

    responses: int
    requested: int
    computed: int
    started: float
    seconds: float
    faults: int
    prefixes: PrefixUse = field(default_factory=PrefixUse)


class ScoringEngine:
    """Runs jobs on one model.

    Create, start and close it on one event loop; `run` may be awaited by any number of tasks there.

    Args:
        model: The model. Its `run_step` is called from the worker thread only.
        name: Name of the model, for the thread and the log.
        on_step: Called on the event loop after every step.
    """

    def __init__(
        self, model: ForwardModel, *, name: str = "default", on_step: Callable[[StepReport], None] | None = None
    ) -> None:
        self._model = model
        self._name = name
        self._on_step = on_step
        self._queue = FairQueue(model.token_budget, model.cached_tokens)
        self._background: deque[tuple[Generator[None, None, Any], asyncio.Future[Any]]] = deque()
        self._wake = threading.Condition()  # guards the queue, the background work and the flags
        self._closing = False
        self._failure: BaseException | None = None
        self._step_began: float | None = None
        self._awaited = 0  # jobs of the queue when those that follow on the last step are there
        self._wait_until = 0.0
        self._pause = 0  # steps that do not wait after the last wait; more after each wait in vain
        self._steps_without_wait = 0  # of these, the ones to come
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
        """Whether the worker ended without being closed. It cannot be started again."""
        return self._failure is not None

    @property
    def step_seconds(self) -> float:
        """Seconds that the present step has been running; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else perf_counter() - began

    def start(self) -> None:
        """Starts the worker; rewards are delivered on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def run(self, job: Job) -> None:
        """Queues a job and waits until every response of it has an outcome.

        If the waiting task is cancelled, the part that is not computed yet leaves the queue.

        Raises:
            EngineStoppedError: The worker has ended.
            UnavailableError: The model cannot compute anything now.
        """
        loop = asyncio.get_running_loop()
        job.done = loop.create_future()
        if not job.remaining:
            return
        with self._wake:
            if not self.alive:
                raise EngineStoppedError(f"The worker of model {self._name!r} has ended.")
            job.queued_at = perf_counter()
            self._queue.push(job)
            self._unfinished.add(job)
            self._wake.notify()
        try:
            await job.done
        finally:
            job.cancelled = True  # without effect on a complete job
            self._unfinished.discard(job)

    async def interleave(self, work: Generator[None, None, T]) -> T:
        """Runs a generator on the worker, by one piece after each step, and whenever there is no step to run.

        If the waiting task is cancelled, or the engine closed, the generator is closed after its present piece.

        Returns:
            What the generator returns.

        Raises:
            EngineStoppedError: The worker has ended, or ended before the generator.
            Exception: Whatever the generator raises.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._wake:
            if not self.alive:
                raise EngineStoppedError(f"The worker of model {self._name!r} has ended.")
            self._background.append((work, future))
            self._wake.notify()
        return await future

    async def close(self, drain_seconds: float | None = None) -> None:
        """Takes no further jobs, finishes those that were accepted, and ends the worker.

        Args:
            drain_seconds: Time after which unfinished jobs fail; None finishes all of them.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        if not self._thread.ident:
            return
        try:
            async with asyncio.timeout(drain_seconds):
                await self._ended.wait()
            self._thread.join()  # it is at its end; a running thread would keep the model in memory
        except TimeoutError:
            _log.warning("Model %s: %d requests were not finished in time", self._name, len(self._unfinished))
        self._fail_all("The server is shutting down.")

    def _work(self) -> None:
        """Runs steps until the engine is closed. The body of the worker thread."""
        try:
            while (step := self._next_step()) is not None:
                if step:
                    self._run_step(step)
                self._advance()
        except BaseException as error:  # noqa: BLE001 - whatever ended the worker, waiting requests must be told
            _log.exception("Model %s: the worker has died", self._name)
            self._failure = error
            self._post(self._fail_all, "The model's worker has died.")
        finally:
            self._post(self._ended.set)

    def _next_step(self) -> Step | None:
        """Waits for work. Returns an empty step if there is background work only, and None at the end."""
        with self._wake:
            self._await_followers()
            while True:
                step = self._queue.take()
                if step or (self._background and not self._closing):
                    return step
                if self._closing:
                    return None
                self._wake.wait()

    def _await_followers(self) -> None:
        """Waits until as many jobs came as the last step completed, or until the time for it is over.

        A job that is not finished keeps the worker busy by itself, and so does background work.
        """
        before = len(self._queue)
        if before >= self._awaited or self._background or self._queue.has_unfinished:
            return
        if self._steps_without_wait:
            self._steps_without_wait -= 1
            return
        waited = False
        while not self._closing and not self._background and len(self._queue) < self._awaited:
            left = self._wait_until - perf_counter()
            if left <= 0:
                break
            self._wake.wait(left)
            waited = True
        if waited:
            in_vain = len(self._queue) == before > 0
            self._pause = min(2 * self._pause + 1, _MOST_STEPS_WITHOUT) if in_vain else 0
            self._steps_without_wait = self._pause

    def _run_step(self, step: Step) -> None:
        self._step_began = started = perf_counter()
        groups = [job.groups[part.group][part.start : part.stop] for job, part in step]
        try:
            result = run_step(self._model, groups, [job.tenant for job, _ in step])
        except UnavailableError as error:
            self._awaited = 0
            self._post(self._fail, step, error)
            return
        finally:
            self._step_began = None
        ended = perf_counter()
        self._awaited = len(self._queue) + sum(job.fully_scheduled for job in {job for job, _ in step})
        self._wait_until = ended + _WAIT * (ended - started)
        self._post(self._deliver, step, result, started, ended - started)

    def _advance(self) -> None:
        """Runs the next piece of background work, if there is any."""
        with self._wake:
            if not self._background or self._closing:
                return
            work, future = self._background[0]
        if future.done():  # the task that waited was cancelled
            work.close()
        else:
            try:
                next(work)
                return
            except StopIteration as end:
                settle = partial(future.set_result, end.value)
            except Exception as error:  # noqa: BLE001 - handed to the awaiting task
                settle = partial(future.set_exception, error)
            self._post(_unless_done, future, settle)
        with self._wake:
            self._background.popleft()

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed, so no request waits any more
            _log.debug("Model %s: the event loop was closed", self._name)

    def _deliver(self, step: Step, result: StepOutcome, started: float, seconds: float) -> None:
        """Hands the outcomes of a step to their jobs, on the event loop."""
        requested = 0
        for (job, part), outcomes, computed in zip(step, result.outcomes, result.computed, strict=True):
            job.record(part.group, part.start, outcomes)
            job.computed += computed
            if job.started_at is None:
                job.started_at = started
            if job.on_computed:
                job.on_computed(computed)
            requested += sum(job.plans[part.group].lengths[part.start : part.stop])
        for job in {job: None for job, _ in step}:
            job.forward_seconds += seconds
            if not job.remaining and job.done and not job.done.done():
                job.done.set_result(None)
        if self._on_step:
            responses = sum(len(outcomes) for outcomes in result.outcomes)
            computed = sum(result.computed)
            report = StepReport(responses, requested, computed, started, seconds, result.faults, result.prefixes)
            self._on_step(report)

    def _fail(self, step: Step, error: UnavailableError) -> None:
        """Ends the jobs of a step that could not be computed; what is left of them leaves the queue."""
        for job in {job: None for job, _ in step}:
            if job.done and not job.done.done():
                job.done.set_exception(copy.copy(error))

    def _fail_all(self, reason: str) -> None:
        with self._wake:
            self._queue.clear()
            futures = [future for _, future in self._background]
        futures += [job.done for job in self._unfinished if job.done]
        for future in futures:
            if not future.done():
                future.set_exception(EngineStoppedError(reason))


def _unless_done(future: asyncio.Future[Any], settle: Callable[[], None]) -> None:
    if not future.done():
        settle()
