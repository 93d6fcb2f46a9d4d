"""The options of a request that are not in its body: `X-Request-Timeout`, `X-Priority`, and its connection."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Self

from starlette.requests import Request

from marginrm_service.errors import ClientGoneError, DeadlineExceededError, InvalidHeaderError
from marginrm_service.settings import Settings

TIMEOUT = "X-Request-Timeout"
PRIORITY = "X-Priority"
_CLASSES = {"interactive": False, "bulk": True}


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The options that a request's headers ask for, and the owner of its key.

    Attributes:
        seconds: The time that it may take.
        bulk: It uses the capacity that interactive requests leave.
        key_owner: Owner of its API key; empty if the server has no keys.
    """

    seconds: float
    bulk: bool
    key_owner: str

    @classmethod
    def of(cls, request: Request, settings: Settings) -> Self:
        """Reads the headers of a request.

        Raises:
            InvalidHeaderError: `X-Request-Timeout` or `X-Priority` is invalid.
        """
        seconds = _seconds(request, settings.request_timeout, settings.max_request_timeout)
        return cls(seconds, _is_bulk(request), request.scope.get("state", {}).get("key_owner", ""))


def _seconds(request: Request, default: float, most: float) -> float:
    """Returns the seconds of `X-Request-Timeout`, at most `most`; `default` without the header."""
    text = request.headers.get(TIMEOUT)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidHeaderError(f"{TIMEOUT} must be a positive number of seconds.", param=TIMEOUT)
    return min(seconds, most)


def _is_bulk(request: Request) -> bool:
    text = request.headers.get(PRIORITY, "interactive")
    if text not in _CLASSES:
        raise InvalidHeaderError(f"{PRIORITY} must be interactive or bulk.", param=PRIORITY)
    return _CLASSES[text]


@contextlib.asynccontextmanager
async def deadline(seconds: float) -> AsyncIterator[None]:
    """Cancels the work inside when the time is up. A job that waits then leaves the queue before its forward pass.

    The work has always stopped by the time this raises, so a 504 is never sent while its request is still computed.

    Raises:
        DeadlineExceededError: The time is up.
    """
    try:
        async with asyncio.timeout(seconds) as scope:
            yield
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise DeadlineExceededError(f"Not done within {seconds:g} s. Send less work, or allow more time.") from error


@contextlib.asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Cancels the work inside when the client disconnects.

    The work has always stopped by the time this raises.

    Args:
        request: A request whose body has been read.

    Raises:
        ClientGoneError: The client has disconnected.
    """
    try:
        async with asyncio.timeout(None) as scope:  # a cancel scope: `_watch` lets it expire
            watcher = asyncio.create_task(_watch(request, scope))
            try:
                yield
            finally:
                watcher.cancel()
                await asyncio.gather(watcher, return_exceptions=True)
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise ClientGoneError("The client closed the connection.") from error


async def _watch(request: Request, scope: asyncio.Timeout) -> None:
    """Lets a scope expire when the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.reschedule(asyncio.get_running_loop().time())
