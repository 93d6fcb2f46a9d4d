"""One check in front of every route: a known key, and not too often."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from marginrm_service.api.errors import error_response
from marginrm_service.keys import KeyFile, RateLimit
from marginrm_service.telemetry.metrics import Metrics

ADMIN = "/admin/"
_OPEN = frozenset({"/healthz", "/readyz", "/", "/docs"})  # probes carry no key; a page asks its reader for one
_OPEN_UNDER = ("/page/", "/models/")  # what the pages are made of
_SCHEME = "bearer "


class KeyCheck:
    """Lets in requests with `Authorization: Bearer KEY`; health routes and the pages' own files stay open.

    Args:
        app: The application.
        metrics: Where refusals are counted.
        keys: For all routes but the admin's; None lets everybody in.
        admin_keys: For the admin routes; None closes them.
        limit: How often each key may ask.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, keys: KeyFile | None, admin_keys: KeyFile | None, limit: RateLimit | None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._keys = keys
        self._admin_keys = admin_keys
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["path"] in _OPEN or scope["path"].startswith(_OPEN_UNDER):
            await self._app(scope, receive, send)
            return
        for_admin = scope["path"].startswith(ADMIN)
        keys = self._admin_keys if for_admin else self._keys
        if keys is None:
            if for_admin:
                await error_response(404, "not_found", "There is no such route.")(scope, receive, send)
            else:
                await self._app(scope, receive, send)
            return
        owner = keys.owner(_presented(scope))
        if owner is None:
            self._metrics.rejections.labels("", "unauthorized").inc()
            message = "This server wants an API key: Authorization: Bearer KEY."
            challenge = {"WWW-Authenticate": "Bearer"}
            await error_response(401, "unauthorized", message, headers=challenge)(scope, receive, send)
            return
        wait = self._limit.take(owner) if self._limit and not for_admin else 0
        if wait:
            self._metrics.rejections.labels("", "rate_limited").inc()
            message = f"This key has asked too often; its next request is due in {wait} s."
            await error_response(429, "rate_limited", message, headers={"Retry-After": str(wait)})(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _presented(scope: Scope) -> str:
    value = Headers(scope=scope).get("authorization", "")
    return value[len(_SCHEME) :].strip() if value[: len(_SCHEME)].lower() == _SCHEME else ""
