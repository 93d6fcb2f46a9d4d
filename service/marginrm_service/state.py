"""The state that the routes of one app share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from fastapi import Depends, Request

from marginrm_service.errors import DrainingError
from marginrm_service.models.registry import ModelRegistry
from marginrm_service.settings import Settings
from marginrm_service.telemetry.metrics import Metrics


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

    def check_ready(self) -> None:
        """Returns if requests are welcome.

        Raises:
            UnavailableError: They are not; the message names the reason.
        """
        if self.draining:
            raise DrainingError("The server is shutting down.")
        self.registry.check_ready()

    async def close(self) -> None:
        """Finishes accepted requests and ends all threads."""
        self.draining = True
        await self.registry.close(self.settings.drain_seconds)
        self.pool.shutdown(wait=False, cancel_futures=True)


def service_of(request: Request) -> Service:
    """Returns the state of the app that a request came to."""
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(service_of)]
