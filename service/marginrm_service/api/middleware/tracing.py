"""OpenTelemetry traces: off unless the standard `OTEL_*` variables turn them on, and never with a client's text.

Each request is a span such as `POST /score`, and its stages are child spans: `tokenise`, `queue`, `forward`. A W3C
`traceparent` makes it part of its client's trace. FastAPI's own spans are off, because they hold the path and the query,
which are the client's text.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from http import HTTPStatus
from importlib.metadata import version
from time import time_ns
from typing import TYPE_CHECKING, Any

from fastapi.telemetry import TelemetryConfig
from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marginrm.errors import ConfigError
from marginrm_service.api.middleware.context import METHODS, QUIET
from marginrm_service.engine.request import ScoringResult
from marginrm_service.telemetry.logs import request_id

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

FASTAPI_OFF: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

_tracer: ContextVar[Tracer | None] = ContextVar("tracer", default=None)


def configured(environment: Mapping[str, str]) -> TracerProvider | None:
    """Returns the tracer provider of the environment; None if it names neither an exporter nor an endpoint.

    `OTEL_TRACES_EXPORTER` may be `otlp` (over HTTP; the default where there is an endpoint), `console` or `none`. The
    SDK reads the other variables: endpoint, headers, sampler, resource, batches.

    Raises:
        ConfigError: The variables ask for an exporter or a protocol that this server does not have.
    """
    has_endpoint = any(environment.get(name) for name in _ENDPOINTS)
    exporter = environment.get("OTEL_TRACES_EXPORTER") or ("otlp" if has_endpoint else "none")
    if exporter == "none" or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), "http/protobuf")
    if exporter not in {"otlp", "console"}:
        raise ConfigError(f"OTEL_TRACES_EXPORTER = {exporter!r}: the accepted values are otlp, console and none.")
    if exporter == "otlp" and protocol != "http/protobuf":
        raise ConfigError(f"{_PROTOCOLS[1]} = {protocol!r}: the only accepted value is http/protobuf.")
    try:
        return _provider(exporter)
    except ImportError as error:
        raise ConfigError(
            "OTEL_* variables turn traces on, which need more packages: run `pip install 'marginrm[otel]'`."
        ) from error


def _provider(exporter: str) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    ours = {"service.name": "marginrm", "service.version": version("marginrm")}
    stated = OTELResourceDetector().detect().attributes
    provider = TracerProvider(resource=Resource.create({**ours, **stated}), shutdown_on_exit=False)
    chosen = ConsoleSpanExporter() if exporter == "console" else OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(chosen))
    return provider


class Tracing:
    """Creates a span for every request except health checks and metrics.

    Args:
        app: The application.
        provider: Exports the spans.
    """

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self._app = app
        self._tracer = provider.get_tracer("marginrm", version("marginrm"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["path"] in QUIET:
            await self._app(scope, receive, send)
            return
        status = 0

        async def recording_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        with self._tracer.start_as_current_span(
            method,
            context=propagate.extract(dict(Headers(scope=scope))),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "marginrm.request_id": request_id.get() or ""},
            record_exception=False,  # messages of other libraries' exceptions may quote a text
            set_status_on_exception=False,
        ) as span:
            token = _tracer.set(self._tracer)
            try:
                await self._app(scope, receive, recording_send)
            except BaseException as error:
                status = status or HTTPStatus.INTERNAL_SERVER_ERROR
                span.set_attribute("error.type", type(error).__qualname__)
                raise
            finally:
                _tracer.reset(token)
                _finish(span, method, getattr(scope.get("route"), "path", None), status)


def _finish(span: Span, method: str, route: str | None, status: int) -> None:
    if route:  # the route's template: the path itself is the client's text
        span.update_name(f"{method} {route}")
        span.set_attribute("http.route", route)
    span.set_attribute("http.response.status_code", status)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        span.set_status(StatusCode.ERROR)


def record(result: ScoringResult) -> None:
    """Adds the outcome of a scoring request, and a child span for each stage, to the present span, if traces are on."""
    tracer = _tracer.get()
    if tracer is None:
        return
    usage, timings = result.usage, result.timings
    facts: dict[str, Any] = {
        "marginrm.model": result.model.name,
        "marginrm.responses": usage.responses,
        "marginrm.tokens": usage.tokens,
        "marginrm.tokens_computed": usage.tokens_computed,
    }
    trace.get_current_span().set_attributes(facts)
    end = time_ns()
    begin = end - int(timings.total * 1e9)
    queued = begin + int(timings.tokenise * 1e9)
    started = queued + int(timings.queue * 1e9)
    for name, since, until in (("tokenise", begin, queued), ("queue", queued, started), ("forward", started, end)):
        tracer.start_span(name, start_time=since).end(until)
