"""Early rejection: a request is refused by its headers only while every queue is full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import httpx
import pytest

from marginrm_service.engine.admission import Admission
from marginrm_service.errors import OverloadedError
from support.server import AppServer, raw_request, serving
from support.service import FakeRewardModel

NO_JSON = {"content": b"{", "headers": {"content-type": "application/json"}}
ASK = {"items": [{"prompt": "p", "response": "r"}]}


@contextlib.contextmanager
def full(server: AppServer, *names: str) -> Iterator[None]:
    """Fills the queues of models."""
    with contextlib.ExitStack() as stack:
        for name in names:
            served = server.service.registry.get(name)
            for _ in range(served.admission.max_requests):
                stack.enter_context(served.admission.acquire(1))
        yield


@pytest.mark.parametrize(("route", "status"), [("/score", 429), ("/best-of-n", 429), ("/get_reward", 503)])
def test_the_body_is_not_read_when_the_queue_is_full(route: str, status: int) -> None:
    with serving(FakeRewardModel(), max_queue_requests=2) as server:
        assert httpx.post(server.url + route, **NO_JSON).status_code == 400
        with full(server, "default"):
            refused = httpx.post(server.url + route, **NO_JSON)
            head = f"POST {route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n"
            raw = raw_request(server.url, head.encode())  # no byte of its body is ever sent
        metrics = httpx.get(f"{server.url}/metrics").text
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["request_id"] == refused.headers["x-request-id"]
    assert raw.startswith(f"HTTP/1.1 {status}".encode())
    assert 'marginrm_rejections_total{model="default",reason="overloaded"} 2.0' in metrics
    assert f'marginrm_requests_total{{method="POST",route="{route}",status="{status}"}} 2.0' in metrics


def test_a_connection_can_be_used_again_after_a_refusal() -> None:
    with serving(FakeRewardModel(), max_queue_requests=1) as server, httpx.Client(base_url=server.url) as http:
        long = {"items": [{"prompt": "p", "response": "word " * 100_000}]}
        with full(server, "default"):
            assert http.post("/score", json=long).status_code == 429
        assert http.post("/score", json=ASK).status_code == 200


def test_other_routes_and_methods_need_no_capacity() -> None:
    with serving(FakeRewardModel(), max_queue_requests=1) as server, full(server, "default"):
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert httpx.get(f"{server.url}/score").status_code == 405


def test_while_one_model_has_capacity_the_body_decides() -> None:
    with serving(FakeRewardModel("a"), FakeRewardModel("b"), max_queue_requests=1) as server:
        with full(server, "a"):
            assert httpx.post(f"{server.url}/score", json={"model": "b", **ASK}).status_code == 200
            assert httpx.post(f"{server.url}/score", json={"model": "a", **ASK}).status_code == 429
            assert httpx.post(f"{server.url}/score", **NO_JSON).status_code == 400
        with full(server, "a", "b"):
            assert httpx.post(f"{server.url}/score", **NO_JSON).status_code == 429
        metrics = httpx.get(f"{server.url}/metrics").text
    assert 'marginrm_rejections_total{model="a",reason="overloaded"} 1.0' in metrics
    assert 'marginrm_rejections_total{model="",reason="overloaded"} 1.0' in metrics


def test_a_body_counts_as_half_of_its_tokens_and_one_quantum_at_most() -> None:
    with serving(FakeRewardModel(), max_queue_tokens=1000) as server:  # a quantum is 512 / 4 = 128 tokens
        admission = server.service.registry.get("default").admission
        room = lambda size: server.on_loop(_room(admission, size))  # noqa: E731
        with admission.acquire(900):  # 100 are left
            assert room(8 * 100)
            assert not room(8 * 101)
        with admission.acquire(872):  # a quantum is left
            assert room(10**9)
        with admission.acquire(873):
            assert not room(10**9)
            assert room(0)
        assert room(10**9)


async def _room(admission: Admission, size: int) -> bool:
    try:
        admission.check_body(size, 60.0, bulk=False)
    except OverloadedError:
        return False
    return True


def test_an_invalid_header_is_answered_by_the_route() -> None:
    with serving(FakeRewardModel(), max_queue_requests=1) as server, full(server, "default"):
        reply = httpx.post(f"{server.url}/score", json=ASK, headers={"X-Request-Timeout": "soon"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "X-Request-Timeout")
