"""How long a request may take: what its client asks for, within what the server allows."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

from starlette.requests import Request

from marginrm_service.errors import DeadlineExceededError, InvalidHeaderError

HEADER = "X-Request-Timeout"


def seconds_allowed(request: Request, default: float, most: float) -> float:
    """Returns the seconds that a request may take: its `X-Request-Timeout`, at most `most`; `default` without one.

    Raises:
        InvalidHeaderError: The header is no positive number.
    """
    asked = request.headers.get(HEADER)
    if asked is None:
        return default
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidHeaderError(f"{HEADER} must be a positive number of seconds.", param=HEADER)
    return min(seconds, most)


@contextlib.asynccontextmanager
async def deadline(seconds: float) -> AsyncIterator[None]:
    """Cancels what runs inside when the time is up; a job that waits then leaves the queue before its forward pass.

    Raises:
        DeadlineExceededError: The time is up.
    """
    try:
        async with asyncio.timeout(seconds) as scope:
            yield
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise DeadlineExceededError(f"Not done within {seconds:g} s. Ask for less, or for more time.") from error
