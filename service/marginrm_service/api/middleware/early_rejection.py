"""Refuses scoring requests before their bodies are read, while no queue could take them.

A server that is asked for three times what it can do refuses two requests of three. Reading, parsing and checking those
bodies first would take its time from the requests that it has accepted.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from marginrm_service.api.deadlines import seconds_allowed
from marginrm_service.api.errors import error_response
from marginrm_service.api.priority import is_bulk
from marginrm_service.errors import InvalidHeaderError, OverloadedError
from marginrm_service.state import Service


class FullHouse:
    """Answers as the queue would, as long as its refusal is certain enough without the body.

    It is no second door: what it lets through is still admitted, or refused, by what its texts cost.

    Args:
        app: The application.
        service: Its state.
        routes: The routes that score, by path, and the status of a refusal on each.
    """

    def __init__(self, app: ASGIApp, service: Service, routes: Mapping[str, tuple[BaseRoute, int]]) -> None:
        self._app = app
        self._service = service
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        asked = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if asked is None:
            await self._app(scope, receive, send)
            return
        route, status = asked
        try:
            self._check_room(Request(scope))
        except InvalidHeaderError:  # the route says so, after what is wrong with the body
            await self._app(scope, receive, send)
        except OverloadedError as error:
            scope["route"] = route  # for the log and the metrics
            headers = {"Retry-After": str(error.retry_after)}
            await error_response(status, error.code, str(error), headers=headers)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check_room(self, request: Request) -> None:
        settings = self._service.settings
        seconds = seconds_allowed(request, settings.request_timeout, settings.max_request_timeout)
        stated = request.headers.get("content-length", "")
        size = int(stated) if stated.isdecimal() and stated.isascii() else 0
        self._service.registry.check_room(size, seconds, bulk=is_bulk(request))
