"""Early rejection: while every model's queue is full, scoring requests are answered without reading their bodies.

A server that is sent three times the work that it can do refuses two requests of three. Reading, parsing and checking
those bodies first would take its time from the requests that it has accepted.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from marginrm_service.api.errors import error_reply, set_overload_status
from marginrm_service.api.request_options import RequestOptions
from marginrm_service.errors import InvalidHeaderError, OverloadedError
from marginrm_service.state import Service


class EarlyRejection:
    """Refuses scoring requests while no queue could take them.

    Requests that pass are still admitted by their real cost. Either refusal has the overload status of the route.

    Args:
        app: The application.
        service: Its state.
        routes: The routes that score, by path, each with its overload status.
    """

    def __init__(self, app: ASGIApp, service: Service, routes: Mapping[str, tuple[BaseRoute, int]]) -> None:
        self._app = app
        self._service = service
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        found = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        route, status = found
        set_overload_status(scope, status)
        try:
            self._check_capacity(Request(scope))
        except InvalidHeaderError:  # answered by the route, which checks the body first
            await self._app(scope, receive, send)
        except OverloadedError as error:
            scope["route"] = route  # for the log and the metrics
            await error_reply(error, scope)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check_capacity(self, request: Request) -> None:
        options = RequestOptions.of(request, self._service.settings)
        stated = request.headers.get("content-length", "")
        size = int(stated) if stated.isdecimal() and stated.isascii() else 0
        self._service.registry.check_body(size, options.seconds, bulk=options.bulk)
