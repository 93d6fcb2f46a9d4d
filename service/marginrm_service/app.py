"""Creates the application: its middleware, routes and lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware import Middleware
from starlette.routing import BaseRoute

from marginrm_service.api import adapters, admin, errors, health, model_detail, native, openapi, pages, streaming
from marginrm_service.api.middleware import tracing
from marginrm_service.api.middleware.auth import ApiKeyAuth
from marginrm_service.api.middleware.body_limit import BodyLimit
from marginrm_service.api.middleware.body_timeout import BodyTimeout
from marginrm_service.api.middleware.content_encoding import ContentEncoding
from marginrm_service.api.middleware.context import RequestContext
from marginrm_service.api.middleware.early_rejection import EarlyRejection
from marginrm_service.errors import OverloadedError
from marginrm_service.keys import KeyFile, RateLimit
from marginrm_service.settings import Settings
from marginrm_service.state import Service

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_DESCRIPTION = """Scores responses to prompts with a reward model that knows how sure it is.

`/score` compares pairs and scores single responses, `/best-of-n` ranks candidates. Every error, on every route, has
the shape `{"error": {"code", "message", "param", "request_id"}}`.
"""


def create_app(
    settings: Settings | None = None,
    *,
    traces: TracerProvider | None = None,
    on_ready: Callable[[], None] | None = None,
    on_failure: Callable[[], None] | None = None,
) -> FastAPI:
    """Creates the application. It answers at once, and is ready when its models are.

    If a model cannot be served, the app stays up, not ready, and `/readyz` reports the reason.

    Args:
        settings: The settings; by default those of the environment.
        traces: Exports OpenTelemetry's spans; by default as the environment's `OTEL_*` variables say.
        on_ready: Called once all models are loaded.
        on_failure: Called when a model cannot be served.

    Raises:
        ConfigError: A setting in the environment, or a key file, is not acceptable.
    """
    service = Service(settings or Settings.load(), on_ready=on_ready, on_failure=on_failure)
    traces = traces or tracing.configured(os.environ)
    app = _App(
        title="marginrm",
        version=version("marginrm"),
        description=_DESCRIPTION,
        lifespan=lambda _: _running(service, traces),
        middleware=_middleware(service, traces),
        docs_url=None,
        redoc_url=None,
        telemetry=tracing.FASTAPI_OFF,
        separate_input_output_schemas=False,  # the output schema of a model with its own serializer would be empty
    )
    app.state.service = service
    errors.install(app)
    for module in (native, model_detail, adapters, health, admin, pages):
        app.include_router(module.router)
    return app


class _App(FastAPI):
    """An app whose OpenAPI document describes streamed lines and every field."""

    def openapi(self) -> dict[str, Any]:
        """Returns the OpenAPI document."""
        return openapi.complete(streaming.describe(super().openapi()))


@contextlib.asynccontextmanager
async def _running(service: Service, traces: TracerProvider | None) -> AsyncIterator[None]:
    """Loads the models at the start, and ends all threads at the end."""
    loading = asyncio.create_task(service.registry.load_all())
    try:
        yield
    finally:
        loading.cancel()
        await service.close()
        if traces:
            await asyncio.to_thread(traces.shutdown)  # sends the spans that it holds


def _middleware(service: Service, traces: TracerProvider | None) -> list[Middleware]:
    """Returns the middleware, outermost first."""
    settings = service.settings
    limit = RateLimit(settings.rate_limit) if settings.rate_limit else None
    keys, admin_keys = _keys(settings.key_file), _keys(settings.admin_key_file)
    return [
        Middleware(RequestContext, metrics=service.metrics),
        *([Middleware(tracing.Tracing, provider=traces)] if traces else []),
        Middleware(ApiKeyAuth, metrics=service.metrics, keys=keys, admin_keys=admin_keys, limit=limit),
        Middleware(BodyTimeout, seconds=settings.body_timeout),
        Middleware(BodyLimit, max_bytes=settings.max_body_bytes),
        Middleware(ContentEncoding, max_bytes=settings.max_body_bytes),
        Middleware(EarlyRejection, service=service, routes=_scoring_routes(settings)),
    ]


def _scoring_routes(settings: Settings) -> dict[str, tuple[BaseRoute, int]]:
    """Returns the routes that score, by path, each with its status when the queue is full."""
    return {
        route.path: (route, status)
        for router, status in (
            (native.router, errors.STATUSES[OverloadedError]),
            *((router, int(settings.adapter_overload_status)) for router in adapters.ROUTERS),
        )
        for route in router.routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ())
    }


def _keys(path: Path | None) -> KeyFile | None:
    return KeyFile(path) if path else None
