"""The application, put together."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from marginrm_service.api import adapters, admin, errors, health, model_detail, native, pages, streaming
from marginrm_service.api.middleware import tracing
from marginrm_service.api.middleware.auth import KeyCheck
from marginrm_service.api.middleware.context import BodyLimit, RequestContext
from marginrm_service.api.middleware.early_rejection import FullHouse
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


def create_app(settings: Settings | None = None, *, traces: TracerProvider | None = None) -> FastAPI:
    """Builds the application. It answers at once, and is ready when its models are.

    If a model cannot be served, the app stays up, unready, and `/readyz` says why; whoever runs it can end the process
    by `app.state.service.registry.on_failure`.

    Args:
        settings: By default read from the environment.
        traces: Where OpenTelemetry's spans go; by default what the environment's `OTEL_*` say, if they say something.

    Raises:
        ConfigError: A setting in the environment, or a key file, is not acceptable.
    """
    service = Service(settings or Settings.load())
    traces = traces or tracing.configured(os.environ)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.registry.load_all())
        try:
            yield
        finally:
            loading.cancel()
            await service.close()
            if traces:
                await asyncio.to_thread(traces.shutdown)  # sends what it holds

    app = _App(
        title="marginrm",
        version=version("marginrm"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry=tracing.FASTAPI_OFF,
        separate_input_output_schemas=False,  # of answers with a serializer of their own it would say nothing
    )
    app.state.service = service
    app.add_middleware(FullHouse, service=service, routes=_scoring_routes(service.settings))
    app.add_middleware(BodyLimit, max_bytes=service.settings.max_body_bytes)
    app.add_middleware(
        KeyCheck,
        metrics=service.metrics,
        keys=_keys(service.settings.key_file),
        admin_keys=_keys(service.settings.admin_key_file),
        limit=RateLimit(service.settings.rate_limit) if service.settings.rate_limit else None,
    )
    if traces:
        app.add_middleware(tracing.Tracing, provider=traces)
    app.add_middleware(RequestContext, metrics=service.metrics)  # the outermost
    errors.install(app)
    app.include_router(native.router)
    app.include_router(model_detail.router)
    app.include_router(adapters.router)
    app.include_router(health.router)
    app.include_router(admin.router)
    app.include_router(pages.router)
    return app


class _App(FastAPI):
    """An app whose OpenAPI document describes streamed lines too."""

    def openapi(self) -> dict[str, Any]:
        """Returns the OpenAPI document."""
        return streaming.describe(super().openapi())


def _scoring_routes(settings: Settings) -> dict[str, tuple[BaseRoute, int]]:
    """Returns the routes that score, by path, and what each answers when the queue is full."""
    return {
        route.path: (route, status)
        for router, status in (
            (native.router, errors.STATUSES[OverloadedError]),
            *((router, settings.adapter_overload_status) for router in adapters.ROUTERS),
        )
        for route in router.routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ())
    }


def _keys(path: Path | None) -> KeyFile | None:
    return KeyFile(path) if path else None
