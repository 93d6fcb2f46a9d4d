"""The state that the routes of one app share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from fastapi import Depends, Request

from marginrm_service.errors import DrainingError
from marginrm_service.models.registry import ModelRegistry
from marginrm_service.settings import Settings
from marginrm_service.telemetry.metrics import Metrics
from marginrm_service.telemetry.replicas import Snapshot


class Service:
    """The state of one app.

    Args:
        settings: The settings, read once at the start.
        on_ready: Called once all models are loaded.
        on_failure: Called when a model cannot be served.

    Attributes:
        metrics: The metrics that `/metrics` shows.
        registry: The models.
        pool: Threads that tokenise.
        draining: Whether the server is shutting down.
        scrape: Returns the content of `/metrics`. On Ray it asks all replicas.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_ready: Callable[[], None] | None = None,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.registry = ModelRegistry(settings, self.metrics, on_ready=on_ready, on_failure=on_failure)
        self.pool = ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="encode")
        self.draining = False
        self.scrape: Callable[[], Awaitable[bytes]] = self._own_metrics

    def check_ready(self) -> None:
        """Returns if requests are welcome.

        Raises:
            UnavailableError: They are not; the message names the reason.
        """
        if self.draining:
            raise DrainingError("The server is shutting down.")
        self.registry.check_ready()

    def snapshot(self, replica: str) -> Snapshot:
        """Returns the present metrics of this process, under the name of its replica."""
        self.registry.refresh_gauges()
        return Snapshot(replica, list(self.metrics.collect()))

    async def _own_metrics(self) -> bytes:
        self.registry.refresh_gauges()
        return self.metrics.exposition()

    async def close(self) -> None:
        """Finishes accepted requests and ends all threads."""
        self.draining = True
        await self.registry.close(self.settings.drain_seconds)
        self.pool.shutdown(wait=False, cancel_futures=True)


async def service_of(request: Request) -> Service:  # FastAPI would call a plain function in a thread
    """Returns the state of the app that a request came to."""
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(service_of)]
