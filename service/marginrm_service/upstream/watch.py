"""Waits for an upstream at the start, and watches it afterwards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from marginrm_service.engine.compute_thread import in_compute_thread
from marginrm_service.errors import UpstreamUnavailableError
from marginrm_service.upstream.model import UpstreamModel
from marginrm_service.upstream.vllm import VllmClient

_PAUSE = 1.0  # seconds between two checks
_log = logging.getLogger(__name__)


async def wait_until_up(client: VllmClient, name: str, report: Callable[[str], None]) -> None:
    """Returns once a server takes requests. A large model takes it minutes to load.

    Args:
        client: The server.
        name: The name of the model that it computes, for the log.
        report: Called with the reason after each check that failed.
    """
    waits = False
    while True:
        try:
            return await in_compute_thread(client.check_health, f"wait-for-{name}")
        except UpstreamUnavailableError as error:
            if not waits:
                _log.warning("Model %r waits for its upstream: %s", name, error)
            waits = True
            report(str(error))
        await asyncio.sleep(_PAUSE)


async def watch(model: UpstreamModel) -> None:
    """Checks a model's server again and again, until the task is cancelled."""
    while True:
        await asyncio.sleep(_PAUSE)
        await in_compute_thread(partial(model.check), f"check-{model.info.name}")
