"""Limits the size of request bodies."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marginrm_service.api.errors import body_too_large


class BodyLimit:
    """Refuses bodies over a limit: at once by their stated length, otherwise as soon as they exceed it.

    FastAPI's own `max_body_size` answers in plain text, and outside of `RequestContext`.

    Args:
        app: The application.
        max_bytes: The largest body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "0")
        received = int(stated) if stated.isdigit() and int(stated) > self._max_bytes else 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive() if received <= self._max_bytes else {"type": "http.request"}
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise body_too_large(self._max_bytes)
            return message

        await self._app(scope, limited_receive, send)
