"""The models of a server by name: loading, self-test, warm-up, lookup, and their end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

from marginrm.allocator import give_memory_back
from marginrm.errors import MarginRMError, ModelError
from marginrm.schemas import ModelCard
from marginrm.tuning.timing import trial_groups
from marginrm_service.engine.compute_thread import ComputeThread
from marginrm_service.engine.job import Job
from marginrm_service.errors import LastModelError, NotReadyError, OverloadedError, UnknownModelError
from marginrm_service.models.served_model import ServedModel
from marginrm_service.settings import DEFAULT_MODEL, ModelSpec, Settings
from marginrm_service.telemetry import logs
from marginrm_service.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from marginrm.reward_model import RewardModel

_log = logging.getLogger(__name__)
T = TypeVar("T")

_RETRY_WHILE_LOADING = 5  # seconds
_NAME_SHOWN = 64  # characters of an unknown name that an error repeats


class ModelRegistry:
    """The models that are served. Belongs to the event loop.

    The first model also answers to `default`, unless another one has that name.

    Args:
        settings: What to load and how.
        metrics: Where to count.

    Attributes:
        failure: Why loading ended, if it failed.
        on_failure: Called when it did.
        on_ready: Called once all models are loaded.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._specs = settings.models
        self._names = dict.fromkeys(spec.name for spec in settings.models)  # in order; the first is the default
        self._served: dict[str, ServedModel] = {}
        self._changing = asyncio.Lock()  # one change at a time: two loads at once would need the memory of both
        self._retiring: set[asyncio.Task[None]] = set()
        self.failure: MarginRMError | None = None
        self.on_failure: Callable[[], None] = _nothing
        self.on_ready: Callable[[], None] = _nothing
        for name in self._names:
            metrics.ready.labels(name).set(0)

    async def load_all(self) -> None:
        """Loads every model of the settings, one after the other, and stops at the first that cannot be served."""
        for spec in self._specs:
            started = perf_counter()
            _log.info("Loading model %r from %s", spec.name, spec.path)
            try:
                model, golden = await _in_daemon_thread(partial(load_model, spec, self._settings))
                await self.add(model, golden=golden, folder=_folder(spec))
            except Exception as error:  # noqa: BLE001 - whatever the checkpoint's fault is, the server says so and ends
                self.failure = _as_model_error(error)
                self.failure.add_note(f"model {spec.name!r}, from {spec.path}")
                _log.error("Model %r cannot be served: %s", spec.name, self.failure, exc_info=error)
                self.on_failure()
                return
            self._announce(model, golden, perf_counter() - started)
        self.on_ready()

    async def load(self, spec: ModelSpec) -> ModelCard:
        """Loads a model and serves it, in the place of the one that has its name, if there is one.

        Until the new one has passed its self-test the old one answers; requests that it has accepted it finishes.

        Raises:
            MarginRMError: The model cannot be served; all is as it was.
        """
        async with self._changing:
            started = perf_counter()
            _log.info("Loading model %r from %s", spec.name, spec.path)
            try:
                model, golden = await _in_daemon_thread(partial(load_model, spec, self._settings))
                await self.add(model, golden=golden, folder=_folder(spec))
            except Exception as error:
                raise _as_model_error(error) from error
            self._announce(model, golden, perf_counter() - started)
            return self._served[spec.name].card()

    async def unload(self, name: str) -> None:
        """Takes a model out of service; requests that it has accepted it finishes.

        Raises:
            UnknownModelError: There is no such model.
            LastModelError: It is the only one.
        """
        async with self._changing:
            served = self.get(name)
            if len(self._names) == 1:
                raise LastModelError(f"{served.name!r} is the only model; load another before.")
            del self._names[served.name], self._served[served.name]
            self._retire(served)
            self._metrics.ready.remove(served.name)
            self._metrics.reward_cache_bytes.remove(served.name)
            self._metrics.drift.forget(served.name)

    def _retire(self, served: ServedModel) -> None:
        card = served.card()
        self._metrics.model_info.remove(*_info_labels(card))
        _log.info("Model %r %s leaves", card.name, card.revision)
        task = asyncio.create_task(served.retire(self._settings.drain_seconds))
        self._retiring.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        """Lets a model that has left go, and its memory."""
        self._retiring.discard(task)
        threading.Thread(target=give_memory_back, name="give-memory-back", daemon=True).start()

    async def add(self, model: RewardModel, *, golden: float | None = None, folder: Path | None = None) -> None:
        """Serves a model that is in memory, under the name in its `info`, once it has scored for the first time.

        A model of that name that was served before finishes what it has accepted.

        Args:
            model: The model.
            golden: Largest difference to a golden reward, if it has golden samples.
            folder: The checkpoint, if it is a local folder.

        Raises:
            MarginRMError: It cannot score.
        """
        served = ServedModel(
            model,
            self._metrics,
            max_queue_tokens=self._settings.max_queue_tokens,
            max_queue_requests=self._settings.max_queue_requests,
            reward_cache_bytes=int(self._settings.reward_cache_mib * 2**20),
            stall_seconds=self._settings.stall_seconds,
            golden=golden,
            folder=folder,
        )
        served.start()
        try:
            await warm_up(served)
        except MarginRMError:
            await served.close(0)
            raise
        before = self._served.get(served.name)
        if before:
            self._retire(before)
        self._names.setdefault(served.name)
        self._served[served.name] = served
        self._metrics.drift.refer(served.name, served.margin_quantiles)
        self._metrics.model_info.labels(*_info_labels(served.card())).set(1)

    def _announce(self, model: RewardModel, golden: float | None, seconds: float) -> None:
        info = model.info
        _log.info(
            "Model %r is loaded after %.1f s: %s, %s; %s; %s; %s; at most %s tokens",
            *(info.name, seconds, info.revision, info.dtype, model.forward_reason),
            "no golden samples to reproduce" if golden is None else f"golden samples reproduced within {golden:.2g}",
            f"calibrated, T = {info.temperature:.3g}" if info.calibrated else "not calibrated, T = 1",
            f"{model.encoder.max_length:,}",
        )

    def get(self, name: str) -> ServedModel:
        """Returns a model that takes requests.

        Raises:
            UnknownModelError: There is no such model.
            NotReadyError: It is loading, or its worker has ended.
        """
        if name == DEFAULT_MODEL and name not in self._names and self._names:
            name = next(iter(self._names))
        if name not in self._names:
            known = ", ".join(self._names)
            raise UnknownModelError(
                f"No model is called {name[:_NAME_SHOWN]!r}; this server has: {known}.", param="model"
            )
        served = self._served.get(name)
        if served is None:
            raise NotReadyError(f"Model {name!r} is still loading.", retry_after=_RETRY_WHILE_LOADING)
        return served

    def get_or_only(self, name: str) -> ServedModel:
        """Returns as `get` does; where only one model is served, it answers to any name.

        Clients of other servers send a name that the operator of this one did not choose.
        """
        return self.get(name if name in self._names or len(self._names) > 1 else DEFAULT_MODEL)

    def check_room(self, size: int, seconds: float, *, bulk: bool) -> None:
        """Returns if some model may have room for a request of which only the head was read.

        Which model it asks for stands in its body, so all have to be full. A refusal is counted under the model's name
        if there is one model only, else under none.

        Raises:
            OverloadedError: As `ServedModel.check_room` does; of several models' refusals, the one with the least wait.
        """
        refusals: list[OverloadedError] = []
        for name in self._names:
            try:
                self.get(name).check_room(size, seconds, bulk=bulk)
            except OverloadedError as error:
                refusals.append(error)
            except NotReadyError:
                return
            else:
                return
        if not refusals:
            return
        refusal = min(refusals, key=lambda error: error.retry_after)
        self._metrics.rejections.labels("" if len(refusals) > 1 else next(iter(self._names)), refusal.code).inc()
        raise refusal

    def check_ready(self) -> None:
        """Returns if every model takes requests.

        Raises:
            NotReadyError: One does not; the message says which and why.
        """
        if self.failure:
            raise NotReadyError(f"Loading failed: {self.failure}", retry_after=60)
        for name in self._names:
            served = self.get(name)
            if not served.alive:
                raise NotReadyError(f"The worker of model {name!r} has ended.", retry_after=60)
            if served.stalled:
                raise NotReadyError(f"A forward pass of model {name!r} does not end.", retry_after=60)

    def check_alive(self) -> None:
        """Returns if no model is beyond help.

        Raises:
            NotReadyError: The worker of one has died, which only a new process mends.
        """
        for served in self._served.values():
            if served.died:
                raise NotReadyError(
                    f"The worker of model {served.name!r} has died. Restart the server.", retry_after=60
                )

    def cards(self) -> list[ModelCard]:
        """Returns the cards of the models that are loaded."""
        return [served.card() for served in self._served.values()]

    def refresh_gauges(self) -> None:
        """Puts the present state of all queues into the metrics."""
        for served in self._served.values():
            served.refresh_gauges()
            self._metrics.ready.labels(served.name).set(served.alive and not served.stalled)

    async def close(self, drain_seconds: float) -> None:
        """Finishes what was accepted, as far as the time allows, and ends all workers."""
        await asyncio.gather(*(served.close(drain_seconds) for served in self._served.values()), *self._retiring)


def load_model(spec: ModelSpec, settings: Settings) -> tuple[RewardModel, float | None]:
    """Loads a model, makes it reproduce its golden samples, and finds its token budget if the settings name none.

    Returns:
        The model, and by how much a golden reward differed at most; None if the checkpoint has no golden samples.

    Raises:
        ModelError: It cannot be loaded, or does not reproduce them.
    """
    logs.adopt_transformers()
    from marginrm.reward_model import RewardModel

    model = RewardModel.from_pretrained(
        spec.path,
        name=spec.name,
        dtype=settings.dtype,
        device=settings.device,
        max_length=settings.max_length,
        trust_remote_code=settings.trust_remote_code,
        token_budget=settings.token_budget,
        compiled=settings.compile,
        deterministic=settings.deterministic,
    )
    golden = model.verify_golden()
    if settings.token_budget is None:
        model.measure_token_budget()
    return model, golden


async def warm_up(served: ServedModel) -> None:
    """Scores in the worker thread, so that no client waits for what is set up at the first forward passes.

    The second step is as large as any: it fetches the memory that such a step takes, and the door learns the rate.

    Raises:
        MarginRMError: The model cannot score.
    """
    group = [served.encoder.encode("Are you there?", response, "prompt_left") for response in ("Yes, I am.", "No.")]
    for groups in ([group], trial_groups(served.encoder, served.token_budget)):
        job = Job.of(groups, share_prefix=served.shares_prefixes)
        await served.run(job)
        failures = [outcome for outcomes in job.outcomes for outcome in outcomes if isinstance(outcome, MarginRMError)]
        if failures:
            raise ModelError(f"The first forward pass failed: {failures[0]}") from failures[0]


def _folder(spec: ModelSpec) -> Path | None:
    path = Path(spec.path)
    return path if path.is_dir() else None


def _info_labels(card: ModelCard) -> tuple[str, ...]:
    return card.name, card.revision, card.dtype, card.forward_path, str(card.calibrated).lower()


def _nothing() -> None:
    pass


def _as_model_error(error: Exception) -> MarginRMError:
    if isinstance(error, MarginRMError):
        return error
    return ModelError(f"{type(error).__name__} while loading: {error}")


async def _in_daemon_thread(function: Callable[[], T]) -> T:
    """Runs a function in a thread that does not keep the process from leaving."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: Sequence[T], error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result[0])
        else:
            future.set_exception(error)

    def run() -> None:
        try:
            outcome: tuple[Sequence[T], BaseException | None] = ([function()], None)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            outcome = ((), error)
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:
            _log.debug("The event loop was gone before a model was loaded")

    ComputeThread(run, "load-model").start()
    return await future
