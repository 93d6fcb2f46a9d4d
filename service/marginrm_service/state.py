"""What the routes of one app share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from marginrm_service.errors import DrainingError
from marginrm_service.models.registry import ModelRegistry
from marginrm_service.settings import Settings
from marginrm_service.telemetry.metrics import Metrics


@dataclass
class Service:
    """The state of one app.

    Attributes:
        settings: As read at the start.
        metrics: What `/metrics` shows.
        registry: The models.
        pool: Threads that tokenise.
        draining: Whether the server is about to leave.
    """

    settings: Settings
    metrics: Metrics = field(init=False)
    registry: ModelRegistry = field(init=False)
    pool: ThreadPoolExecutor = field(init=False)
    draining: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.registry = ModelRegistry(self.settings, self.metrics)
        self.pool = ThreadPoolExecutor(self.settings.encode_threads, thread_name_prefix="encode")

    def check_ready(self) -> None:
        """Returns if requests are welcome.

        Raises:
            UnavailableError: They are not; the message says why.
        """
        if self.draining:
            raise DrainingError("The server is about to leave.")
        self.registry.check_ready()

    async def close(self) -> None:
        """Finishes what was accepted and ends all threads."""
        self.draining = True
        await self.registry.close(self.settings.drain_seconds)
        self.pool.shutdown(wait=False, cancel_futures=True)


def service_of(request: Request) -> Service:
    """Returns the state of the app that a request came to."""
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(service_of)]
