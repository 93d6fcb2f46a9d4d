"""In Ray's proxies: gives each scoring request the key of its prompt, and sends it again if its replica dies.

    export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=marginrm_service.ray_serve.proxy.middleware

A proxy knows headers only, and a router knows what the proxy hands it. So this middleware reads bodies of ordinary size,
and passes the key on in the header of Ray's sessions. Scoring has no effects, so to send a request twice is safe.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marginrm_service.api import adapters, native
from marginrm_service.errors import NotReadyError
from marginrm_service.ray_serve.prompt_key import request_keys

SESSION_HEADER = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id")  # Ray reads it the same way
MODEL_HEADER = "serve_multiplexed_model_id"  # Ray's
_HELD_BYTES = 4 * 2**20  # of a body that is held for another attempt; longer ones are not
_READ_BYTES = 256 * 2**10  # of a body that is read for its prompt: some milliseconds of the proxy's loop
_STALL_SECONDS = 10.0  # without a part of the body; then the replica gets what came, and watches the client
_ATTEMPTS = 3
_PATHS = tuple(
    path
    for router in (native.router, *adapters.ROUTERS)
    for route in router.routes
    if "POST" in getattr(route, "methods", ()) and (path := getattr(route, "path", ""))
)

_log = logging.getLogger("ray.serve")  # the proxy's log


def middleware() -> list[Middleware]:
    """Returns the middleware of a proxy; Ray calls it at the proxy's start."""
    return [Middleware(PromptAffinity)]


class PromptAffinity:
    """ASGI middleware around Ray's proxy.

    Args:
        app: The proxy.
        attempts: How often a request is sent at most.
    """

    def __init__(self, app: ASGIApp, attempts: int = _ATTEMPTS) -> None:
        self._app = app
        self._attempts = attempts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request to a replica; a scoring request by its prompt, and to another replica if its own dies."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(_PATHS):
            await self._app(scope, receive, send)
            return
        body = await _read(receive, Headers(scope=scope))
        scope = _keyed(scope, body)
        attempts = self._attempts if body.complete else 1
        for attempt in range(1, attempts + 1):
            relay = _Relay(body.messages, receive, send)
            await self._app({**scope, "headers": list(scope["headers"])}, relay.receive, relay.send)
            if relay.answered or relay.client_left:
                return
            _log.warning("The replica of a scoring request died; attempt %d of %d", attempt, attempts)
        await _refuse(send)


@dataclass(frozen=True, slots=True)
class _Body:
    """The first messages of a request; `complete` if they are its whole body."""

    messages: Sequence[Message]
    complete: bool

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


class _Relay:
    """One attempt: gives the proxy the messages that were read and then those that come, and watches what it sends."""

    def __init__(self, messages: Sequence[Message], receive: Receive, send: Send) -> None:
        self._messages = deque(messages)
        self._receive, self._send = receive, send
        self.answered = False
        self.client_left = False

    async def receive(self) -> Message:
        message = self._messages.popleft() if self._messages else await self._receive()
        self.client_left = message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        self.answered = True
        await self._send(message)


async def _read(receive: Receive, headers: Headers) -> _Body:
    """Reads the body, if its length is stated and moderate."""
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and int(length) <= _HELD_BYTES):
        return _Body((), complete=False)
    messages: list[Message] = []
    more = True
    while more:
        try:
            message = await asyncio.wait_for(receive(), _STALL_SECONDS)
        except TimeoutError:
            return _Body(messages, complete=False)
        messages.append(message)
        if message["type"] != "http.request":  # the client left
            return _Body(messages, complete=False)
        more = message.get("more_body", False)
    return _Body(messages, complete=True)


def _keyed(scope: Scope, body: _Body) -> Scope:
    """Returns the scope with its model and the key of its prompt, as far as they are known and the client named none."""
    headers = Headers(scope=scope)
    plain = headers.get("content-encoding", "identity") == "identity"
    if not (body.complete and plain and len(body.content) <= _READ_BYTES):
        return scope
    keys = request_keys(body.content)
    scope = {**scope, "headers": list(scope["headers"])}
    for name, value in ((MODEL_HEADER, keys.model), (SESSION_HEADER, keys.prompt)):
        if value is not None and name not in headers:
            MutableHeaders(scope=scope).append(name, value)
    return scope


async def _refuse(send: Send) -> None:
    """Answers 503 in the service's shape, because clients send a 503 again."""
    error = NotReadyError("The replica died before it answered.", retry_after=1)
    content = json.dumps({"error": {"code": error.code, "message": str(error)}}).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", str(error.retry_after).encode())]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": content})
