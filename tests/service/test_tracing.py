"""Traces: a span for every request, child spans for its stages, in its client's trace, without its text."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from marginrm.errors import ConfigError
from marginrm_service.api.middleware import tracing
from marginrm_service.app import create_app
from marginrm_service.settings import Settings
from support.server import AppServer
from support.service import FakeRewardModel

CANARY = "xylophone-canary-4711"
ASK = {"items": [{"id": CANARY, "prompt": f"{CANARY}?", "response": f"{CANARY}!"}]}
STAGES = ["tokenise", "queue", "forward"]


class Traced:
    """An app whose spans are kept in memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.server = AppServer(create_app(Settings(), traces=provider))
        self.model = FakeRewardModel()
        self.server.start()
        self.server.on_loop(self.server.service.registry.add(self.model))
        self.http = httpx.Client(base_url=self.server.url, timeout=120)

    def spans(self) -> list[ReadableSpan]:
        """The spans since the last call. A request's own ends after its answer."""
        self.server.stop()
        return list(self._exporter.get_finished_spans())

    def close(self) -> None:
        self.http.close()
        self.server.stop()


@pytest.fixture
def traced() -> Iterator[Traced]:
    app = Traced()
    yield app
    app.close()


def test_a_request_is_a_span_with_its_stages_in_its_clients_trace(traced):
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-ID": "mine"}
    traced.http.post("/score", json=ASK, headers=headers).raise_for_status()
    traced.http.close()
    *stages, request = traced.spans()
    assert (request.name, request.kind, request.status.status_code) == (
        "POST /score",
        SpanKind.SERVER,
        StatusCode.UNSET,
    )
    assert f"{request.context.trace_id:032x}" == trace
    assert f"{request.parent.span_id:016x}" == parent
    tokens = len(traced.model.encoder.encode(f"{CANARY}?", f"{CANARY}!").ids)
    assert dict(request.attributes) == {
        "http.request.method": "POST",
        "http.route": "/score",
        "http.response.status_code": 200,
        "marginrm.request_id": "mine",
        "marginrm.model": "default",
        "marginrm.responses": 1,
        "marginrm.tokens": tokens,
        "marginrm.tokens_computed": tokens,
    }
    assert [stage.name for stage in stages] == STAGES
    assert {stage.parent.span_id for stage in stages} == {request.context.span_id}
    times = [time for stage in stages for time in (stage.start_time, stage.end_time)]
    assert times == sorted(times)


def test_without_a_traceparent_each_request_begins_a_trace_and_probes_make_none(traced):
    for _ in range(2):
        traced.http.post("/score", json=ASK)
    for path in ("/healthz", "/readyz", "/metrics"):
        traced.http.get(path)
    traced.http.close()
    requests = [span for span in traced.spans() if span.kind == SpanKind.SERVER]
    assert [span.name for span in requests] == ["POST /score"] * 2
    assert len({span.context.trace_id for span in requests}) == 2
    assert {span.parent for span in requests} == {None}


def test_no_text_of_a_client_is_in_a_span(traced):
    traced.model.encoder.encode_group = lambda *_: None  # a bug, and what it raises may quote
    broken = traced.http.post("/score", json=ASK)
    del traced.model.encoder.encode_group
    traced.http.get(f"/{CANARY}", params={CANARY: CANARY}, headers={"user-agent": CANARY})
    traced.http.request("POST", "/best-of-n", content="{" + CANARY)
    traced.http.request("PROPFIND", "/score")
    traced.http.close()
    spans = traced.spans()
    assert not any(CANARY.lower() in span.to_json().lower() for span in spans)
    assert broken.status_code == 500
    assert spans[0].status.status_code == StatusCode.ERROR
    assert spans[0].attributes["http.response.status_code"] == 500
    assert [span.name for span in spans] == ["POST /score", "GET", "POST /best-of-n", "_OTHER /score"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "rewards"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_traces_are_off_unless_asked_for(environment):
    assert tracing.configured(environment) is None


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_TRACES_EXPORTER": "zipkin"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
)
def test_an_unsupported_exporter_is_an_error(environment):
    with pytest.raises(ConfigError, match=r"the (only )?accepted value"):
        tracing.configured(environment)


def test_without_the_extra_only_traces_are_unavailable():
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from marginrm_service.app import create_app\n"
        "from marginrm_service.settings import Settings\n"
        "create_app(Settings())\n"
        "import os; os.environ['OTEL_TRACES_EXPORTER'] = 'otlp'\n"
        "try: create_app(Settings())\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ConfigError")
    assert "marginrm[otel]" in done.stdout


def test_the_standard_variables_send_spans_to_a_collector(monkeypatch):
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_address[1]}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "rewards-of-team-a")
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # its own spans and logs hold what the client sent
    server = AppServer(create_app(Settings()))
    server.start()
    server.on_loop(server.service.registry.add(FakeRewardModel()))
    httpx.post(f"{server.url}/score", json=ASK).raise_for_status()
    server.stop()  # sends what is left
    collector.shutdown()
    collector.server_close()
    assert {path for path, _ in received} == {"/v1/traces"}
    sent = b"".join(body for _, body in received)
    for part in (b"rewards-of-team-a", b"POST /score", *(stage.encode() for stage in STAGES)):
        assert part in sent
    assert CANARY.encode() not in sent
