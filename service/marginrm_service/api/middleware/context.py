"""The outermost middleware: request id, timing, log line, metrics, and a reply to unexpected exceptions."""

from __future__ import annotations

import asyncio
import logging
import re
from http import HTTPStatus
from random import getrandbits
from time import perf_counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marginrm_service.api.errors import internal_error, unfinished
from marginrm_service.telemetry.logs import request_id
from marginrm_service.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Routes that orchestrators and Prometheus request every few seconds: their log lines would hide all others.
QUIET = frozenset({"/healthz", "/readyz", "/metrics"})
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
}


class RequestContext:
    """Gives each request an id, measures and logs it, and answers 500 after an unexpected exception.

    A client's `X-Request-ID` is used if it is short and plain; otherwise a new id is made. The reply carries it. The log
    has the route's template, because the path itself is the client's text.

    Args:
        app: The application.
        metrics: Where requests are recorded.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = _request_id(scope)
        token = request_id.set(identity)
        started = perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = identity
                if scope["app"].state.service.draining:
                    headers["Connection"] = "close"  # so that the client sends its next request to another server
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # the server shuts down, and did not finish this request in time
            if not status:
                await unfinished()(scope, receive, send_with_headers)
        except Exception as error:  # noqa: BLE001 - every fault is logged, and its details never reach a client
            _log.error("A request failed unexpectedly", exc_info=error)
            if not status:
                await internal_error()(scope, receive, send_with_headers)
        finally:
            self._finish(scope, status, perf_counter() - started)
            request_id.reset(token)

    def _finish(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.answered(route, method, status, seconds)
        if route not in QUIET or status == HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.info(
                "request", extra={"method": method, "route": route, "status": status, "ms": round(seconds * 1000, 2)}
            )


def _request_id(scope: Scope) -> str:
    sent = Headers(scope=scope).get("x-request-id")
    return sent if sent and _ACCEPTED_ID.fullmatch(sent) else f"{getrandbits(64):016x}"
