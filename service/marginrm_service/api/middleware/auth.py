"""Authentication by API keys, and a rate limit for each key."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from marginrm_service.api.errors import error_response
from marginrm_service.keys import KeyFile, RateLimit
from marginrm_service.telemetry.metrics import ANY_MODEL, Metrics

ADMIN = "/admin/"
_OPEN = frozenset({"/healthz", "/readyz", "/", "/docs"})  # probes have no key; a page asks its reader for one
_OPEN_UNDER = ("/page/", "/models/")  # the pages' own files
_SCHEME = "bearer "


class ApiKeyAuth:
    """Admits requests with `Authorization: Bearer KEY`; health routes and the pages' own files need no key.

    Args:
        app: The application.
        metrics: Where refusals are recorded.
        keys: Keys for all routes except the admin's; None admits every request.
        admin_keys: Keys for the admin routes; None closes them.
        limit: Rate limit of each key; None for no limit.
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
                await error_response(404, "not_found", "This route does not exist.")(scope, receive, send)
            else:
                await self._app(scope, receive, send)
            return
        owner = keys.owner(_presented(scope))
        if owner is None:
            self._metrics.rejected(ANY_MODEL, "unauthorized")
            message = "This server needs an API key: Authorization: Bearer KEY."
            challenge = {"WWW-Authenticate": "Bearer"}
            await error_response(401, "unauthorized", message, headers=challenge)(scope, receive, send)
            return
        wait = self._limit.take(owner) if self._limit and not for_admin else 0
        if wait:
            self._metrics.rejected(ANY_MODEL, "rate_limited")
            message = f"This key has reached its rate limit; send its next request in {wait} s."
            await error_response(429, "rate_limited", message, headers={"Retry-After": str(wait)})(scope, receive, send)
            return
        scope.setdefault("state", {})["key_owner"] = owner
        await self._app(scope, receive, send)


def _presented(scope: Scope) -> str:
    value = Headers(scope=scope).get("authorization", "")
    return value[len(_SCHEME) :].strip() if value[: len(_SCHEME)].lower() == _SCHEME else ""
