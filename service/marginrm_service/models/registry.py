"""The models of a server by name: leases, swaps, unloading and readiness."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from marginrm.allocator import give_memory_back
from marginrm.errors import MarginRMError, ModelError
from marginrm.schemas import ModelCard
from marginrm_service.errors import LastModelError, NotReadyError, OverloadedError, UnknownModelError
from marginrm_service.models import loading
from marginrm_service.models.served_model import ServedModel
from marginrm_service.settings import DEFAULT_MODEL, ModelSpec, Settings
from marginrm_service.telemetry.metrics import ANY_MODEL, Metrics

if TYPE_CHECKING:
    from marginrm.reward_model import RewardModel
    from marginrm_service.upstream.model import UpstreamModel

_log = logging.getLogger(__name__)

_RETRY_WHILE_LOADING = 5  # seconds
_RETRY_AFTER_FAILURE = 60
_NAME_SHOWN = 64  # characters of an unknown name that an error repeats


class ModelRegistry:
    """The models that are served. Belongs to the event loop.

    The first model also answers to `default`, unless another one has that name. With `max_loaded_models`, the models
    beyond are loaded on demand: `acquire` loads one, and the least recently used one leaves.

    Args:
        settings: The models to load, and how.
        metrics: Where models and refusals are recorded.
        on_ready: Called once all models of the settings are loaded.
        on_failure: Called when one of them cannot be served.

    Attributes:
        failure: The reason why loading ended, if it failed.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        on_ready: Callable[[], None] | None = None,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._names = dict.fromkeys(spec.name for spec in settings.models)  # in order; the first is the default
        self._specs = {spec.name: spec for spec in settings.models}
        self._most = settings.max_loaded_models
        self._started = False  # all models that are loaded at the start are
        self._served: dict[str, ServedModel] = {}  # the least recently used first
        self._loads: dict[str, asyncio.Task[None]] = {}  # those on demand
        self._waiting = Counter[str]()  # requests for models that are loaded on demand
        self._waits_for: dict[str, str] = {}  # by name the reason why loading has not begun
        self._changing = asyncio.Lock()  # one change at a time: two loads at once would need the memory of both
        self._one_compilation = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self.failure: MarginRMError | None = None
        for spec in settings.models[: self._most]:
            metrics.model_loading(spec.name)

    async def load_all(self) -> None:
        """Loads the models of the settings, as many as may be in memory, and stops at the first that cannot be served."""
        for spec in self._settings.models[: self._most]:
            try:
                await loading.wait_for_upstream(spec, self._settings, partial(self._waits_for.__setitem__, spec.name))
                await self._load(spec)
            except MarginRMError as error:
                error.add_note(f"model {spec.name!r}, from {spec.path}")
                _log.error("Model %r cannot be served: %s", spec.name, error, exc_info=_unexpected(error))
                self.failure = error
                if self._on_failure:
                    self._on_failure()
                return
        self._started = True
        if self._on_ready:
            self._on_ready()

    def on_demand(self, name: str) -> bool:
        """Returns whether a model is known, not in memory, and loaded by `acquire`."""
        name = self._named(name)
        return self._started and name in self._specs and name not in self._served

    async def acquire(self, name: str) -> AbstractContextManager[ServedModel]:
        """Returns a lease as `lease` does, and loads the model before if it is one on demand. Enter it at once.

        All requests for a model share one load. A caller that is cancelled leaves it to the others.

        Raises:
            UnknownModelError, NotReadyError: As `get` does; also if the model cannot be loaded.
        """
        name = self._named(name)
        self._waiting[name] += 1
        try:
            while self.on_demand(name):
                if name not in self._loads:
                    self._loads[name] = asyncio.create_task(self._load_on_demand(self._specs[name]))
                    self._loads[name].add_done_callback(lambda _: self._loads.pop(name))
                await asyncio.shield(self._loads[name])
        finally:
            self._waiting[name] -= 1
        return self.lease(name)

    async def _load_on_demand(self, spec: ModelSpec) -> None:
        async with self._changing:
            if not self.on_demand(spec.name):
                return
            while self._most and len(self._served) >= self._most:
                name = next(iter(self._served))
                while self._waiting[name]:  # noqa: ASYNC110 - those that waited for its load go on within this loop's next turns
                    await asyncio.sleep(0)
                _log.info("Model %r leaves memory for %r", name, spec.name)
                leaving = self._served.pop(name)
                self._metrics.model_left(name)
                await asyncio.shield(self._retire(leaving))  # before the load: both may not fit
            try:
                await self._load(spec)
            except MarginRMError as error:
                _log.error("Model %r cannot be loaded: %s", spec.name, error, exc_info=_unexpected(error))
                raise NotReadyError(
                    f"Model {spec.name!r} cannot be loaded: {error}", retry_after=_RETRY_AFTER_FAILURE
                ) from error

    async def load(self, spec: ModelSpec) -> ModelCard:
        """Loads a model and serves it. A model of the same name is replaced.

        Until the new model has passed its self-test the old one answers, and it finishes the requests that it accepted.

        Raises:
            MarginRMError: The model cannot be served. Nothing has changed.
        """
        async with self._changing:
            await self._load(spec)
            self._specs[spec.name] = spec
            return self._served[spec.name].card()

    async def _load(self, spec: ModelSpec) -> None:
        try:
            loaded = await loading.load(spec, self._settings)
            await self.add(loaded.model, golden=loaded.golden, folder=loaded.folder)
        except MarginRMError:
            raise
        except Exception as error:  # whatever the fault of the checkpoint is, the reason is reported
            raise ModelError(f"{type(error).__name__} while loading: {error}") from error

    async def add(
        self, model: RewardModel | UpstreamModel, *, golden: float | None = None, folder: Path | None = None
    ) -> None:
        """Serves a model that is in memory, under the name in its `info`, once it has scored for the first time.

        An earlier model of that name finishes the requests that it accepted.

        Args:
            model: The model.
            golden: Largest difference of a golden reward; None without golden samples.
            folder: The checkpoint, if it is a local folder.

        Raises:
            MarginRMError: It cannot score.
        """
        served = ServedModel(model, self._settings, self._metrics, golden=golden, folder=folder)
        await loading.start(served)
        before = self._served.get(served.name)
        self._names.setdefault(served.name)
        self._served[served.name] = served
        self._metrics.model_loaded(served.card(), served.margin_quantiles, tells_familiarity=served.tells_familiarity)
        served.watch_upstream()
        if self._settings.compile == "auto":
            served.compile_in_background(self._one_compilation)
        if before:
            self._retire(before)

    async def unload(self, name: str) -> None:
        """Takes a model out of service; it finishes the requests that it accepted.

        Raises:
            UnknownModelError: No model has that name.
            LastModelError: It is the only one.
        """
        async with self._changing:
            served = self.get(name)
            if len(self._names) == 1:
                raise LastModelError(f"{served.name!r} is the only model; load another before.")
            del self._names[served.name], self._served[served.name]
            self._specs.pop(served.name, None)
            self._metrics.model_left(served.name)
            self._retire(served)

    def _retire(self, served: ServedModel) -> asyncio.Task[None]:
        _log.info("Model %r %s is retired", served.name, served.info.revision)
        task = asyncio.create_task(served.retire(self._settings.drain_seconds))
        self._retiring.add(task)
        task.add_done_callback(self._free)
        return task

    def _free(self, task: asyncio.Task[None]) -> None:
        """Drops the last reference to a retired model, and returns its memory to the operating system."""
        self._retiring.discard(task)
        threading.Thread(target=give_memory_back, name="give-memory-back", daemon=True).start()

    def lease(self, name: str) -> AbstractContextManager[ServedModel]:
        """Returns a model for one request, as a context manager. It stays in service until the end of the lease.

        Raises:
            UnknownModelError, NotReadyError: As `get` does.
        """
        served = self.get(name)
        self._served[served.name] = self._served.pop(served.name)  # now the most recently used
        return served.lease()

    def get(self, name: str) -> ServedModel:
        """Returns a model that takes requests. Use `lease` to score with it.

        Raises:
            UnknownModelError: No model has that name.
            NotReadyError: It is loading.
        """
        name = self._named(name)
        if name not in self._names:
            known = ", ".join(self._names)
            raise UnknownModelError(
                f"No model is called {name[:_NAME_SHOWN]!r}; this server has: {known}.", param="model"
            )
        served = self._served.get(name)
        if served is None and self.on_demand(name):
            raise NotReadyError(
                f"Model {name!r} is not in memory; a scoring request loads it.", retry_after=_RETRY_WHILE_LOADING
            )
        if served is None:
            reason = self._waits_for.get(name, "")
            raise NotReadyError(f"Model {name!r} is still loading. {reason}".rstrip(), retry_after=_RETRY_WHILE_LOADING)
        return served

    def _named(self, name: str) -> str:
        """Returns a model's name; that of the first model for `default`, unless one has that name."""
        if name == DEFAULT_MODEL and name not in self._names and self._names:
            return next(iter(self._names))
        return name

    def known_or_only(self, name: str) -> str:
        """Returns the name itself, or that of the only model, which answers to any name.

        Clients of other servers send a name that the operator of this one did not choose.
        """
        return name if name in self._names or len(self._names) > 1 else DEFAULT_MODEL

    def check_body(self, size: int, seconds: float, *, bulk: bool) -> None:
        """Returns if some model may have capacity for a request of which only the headers are known.

        Its body names the model, so all models have to be full. A refusal is recorded under the model's name if there is
        one model only, else under `ANY_MODEL`.

        Raises:
            OverloadedError: As `Admission.check_body` does; of several refusals, the one with the shortest wait.
        """
        refusals: list[OverloadedError] = []
        for name in self._names:
            try:
                self.get(name).admission.check_body(size, seconds, bulk=bulk)
            except OverloadedError as error:
                refusals.append(error)
            except NotReadyError:
                return
            else:
                return
        if not refusals:
            return
        refusal = min(refusals, key=lambda error: error.retry_after)
        self._metrics.rejected(ANY_MODEL if len(refusals) > 1 else next(iter(self._names)), refusal.code)
        raise refusal

    def check_ready(self) -> None:
        """Returns if every model takes requests, or is loaded by one.

        Raises:
            NotReadyError, UpstreamUnavailableError: One does not; the message names it and the reason.
        """
        if self.failure:
            raise NotReadyError(f"Loading failed: {self.failure}", retry_after=_RETRY_AFTER_FAILURE)
        for name in self._names:
            if self.on_demand(name):
                continue
            served = self.get(name)
            if not served.engine.alive:
                raise NotReadyError(f"The worker of model {name!r} has ended.", retry_after=_RETRY_AFTER_FAILURE)
            if served.stalled:
                raise NotReadyError(f"A forward pass of model {name!r} does not end.", retry_after=_RETRY_AFTER_FAILURE)
            served.check_upstream()

    def check_alive(self) -> None:
        """Returns if no worker has died.

        Raises:
            NotReadyError: One has, and only a new process helps.
        """
        for served in self._served.values():
            if served.engine.died:
                raise NotReadyError(
                    f"The worker of model {served.name!r} has died. Restart the server.",
                    retry_after=_RETRY_AFTER_FAILURE,
                )

    def cards(self) -> list[ModelCard]:
        """Returns the cards of the models that are loaded, in the order in which they were given."""
        return [self._served[name].card() for name in self._names if name in self._served]

    def queued_tokens(self) -> int:
        """Returns the tokens of all models that wait or are computed."""
        return sum(served.queue_state().tokens for served in self._served.values())

    def refresh_gauges(self) -> None:
        """Records the present state of all queues in the metrics."""
        for served in self._served.values():
            state = served.queue_state()
            self._metrics.model_state(
                served.name,
                ready=served.ready,
                tokens=state.tokens,
                requests=state.requests,
                cache_bytes=state.cache_bytes,
                compiled=served.compiled,
                prefix_bytes=state.prefix_bytes,
            )

    async def close(self, drain_seconds: float) -> None:
        """Finishes accepted requests, as far as the time allows, and ends all workers."""
        workers = (served.close(drain_seconds) for served in self._served.values())
        await asyncio.gather(*workers, *self._retiring)


def _unexpected(error: MarginRMError) -> BaseException | None:
    """Returns an error that has another one as its cause, for a log with the traceback; None for a message that says all."""
    return error if error.__cause__ and not isinstance(error.__cause__, MarginRMError) else None
