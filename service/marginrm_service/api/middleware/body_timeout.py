"""Limits the time that a request body may pause."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marginrm_service.api.errors import BodyError


class BodyTimeout:
    """Answers 408 if no byte of a request body arrives for some time. A complete body ends the limit.

    Args:
        app: The application.
        seconds: The longest pause.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        complete = scope["type"] != "http"

        async def receive_in_time() -> Message:
            nonlocal complete
            try:
                async with asyncio.timeout(None if complete else self._seconds):
                    message = await receive()
            except TimeoutError as error:
                message_text = f"No byte of the body arrived for {self._seconds:g} s. Send the request again."
                raise BodyError(408, "body_timeout", message_text, close=True) from error
            complete = complete or not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)
