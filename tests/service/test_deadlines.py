"""Deadlines and priorities: late work leaves the queue before its forward pass and delays no other request."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from starlette.requests import Request

from marginrm_service.api.request_options import deadline, while_connected
from marginrm_service.errors import DeadlineExceededError
from support.server import serving
from support.service import FakeRewardModel, Gate

ASK = {"items": [{"prompt": "Hi?", "response": "Yes."}]}
LATE = {"items": [{"prompt": "Late?", "response": "Never computed."}]}


def test_late_work_leaves_the_queue_before_its_forward_pass() -> None:
    gate = Gate()
    model = FakeRewardModel()
    with (
        serving(model, reward_cache_mib=0) as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
        ThreadPoolExecutor() as pool,
    ):
        model.on_forward = gate
        steps = len(model.steps)
        held = pool.submit(http.post, "/score", json=ASK)
        assert gate.entered.acquire(timeout=120)
        started = time.monotonic()
        late = http.post("/score", json=LATE, headers={"X-Request-Timeout": "0.2"})
        assert 0.2 <= time.monotonic() - started < 10
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        model.on_forward = lambda _: None
        gate.open()
        assert held.result(30).status_code == 200
        assert http.post("/score", json=ASK).status_code == 200
        scored = [member.ids for step in model.steps[steps:] for group in step for member in group]
        assert len(scored) == 2
        assert model.encoder.encode("Late?", "Never computed.").ids not in scored
        assert server.service.registry.get("default").queue_state().tokens == 0
        assert 'marginrm_rejections_total{model="default",reason="deadline_exceeded"} 1.0' in http.get("/metrics").text


def test_late_work_has_stopped_before_the_deadline_error_is_raised() -> None:
    ended = []

    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)  # as a waiting job needs some iterations of the loop to be marked as cancelled
            ended.append(True)

    async def ask() -> list[bool]:
        connected = Request({"type": "http"}, receive=asyncio.Queue[dict[str, str]]().get)
        try:
            async with deadline(0.01), while_connected(connected):
                await stubborn()
        except DeadlineExceededError:
            return list(ended)
        raise AssertionError("it was not late")

    assert asyncio.run(ask()) == [True]


def test_the_server_has_a_default_deadline_and_a_longest() -> None:
    gate = Gate()
    model = FakeRewardModel()
    with (
        serving(model, request_timeout=0.2, max_request_timeout=0.4) as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        model.on_forward = gate
        for headers in ({}, {"X-Request-Timeout": "1000"}):
            assert http.post("/score", json=ASK, headers=headers).status_code == 504
        model.on_forward = lambda _: None
        gate.open(2)


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf", ""])
def test_an_invalid_timeout_is_refused(value: str) -> None:
    with serving(FakeRewardModel()) as server, httpx.Client(base_url=server.url, timeout=120) as http:
        reply = http.post("/score", json=ASK, headers={"X-Request-Timeout": value})
        assert (reply.status_code, reply.json()["error"]["param"]) == (422, "X-Request-Timeout")


def test_a_header_marks_bulk_work_and_other_classes_are_refused() -> None:
    with serving(FakeRewardModel()) as server, httpx.Client(base_url=server.url, timeout=120) as http:
        for value in ("bulk", "interactive"):
            assert http.post("/score", json=ASK, headers={"X-Priority": value}).status_code == 200
        reply = http.post("/score", json=ASK, headers={"X-Priority": "urgent"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (422, "X-Priority")


def test_work_that_would_be_late_is_refused_at_once_and_short_work_is_not() -> None:
    model = FakeRewardModel(on_forward=lambda _: time.sleep(0.25))  # a step of 512 tokens: some 2,000 tokens/s
    with (
        serving(model) as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
        ThreadPoolExecutor() as pool,
    ):
        served = server.service.registry.get("default")
        long = {"items": [{"prompt": f"{number} " * 30, "response": "Yes. " * 20} for number in range(60)]}
        first = pool.submit(http.post, "/score", json=long)
        while served.queue_state().tokens < 4_000:
            time.sleep(0.005)
        late = http.post("/score", json=long, headers={"X-Request-Timeout": "1"})
        assert (late.status_code, late.json()["error"]["code"]) == (429, "would_be_late")
        assert int(late.headers["Retry-After"]) >= 1
        assert http.post("/score", json=ASK, headers={"X-Request-Timeout": "5"}).status_code == 200
        assert first.result(60).status_code == 200
        assert 'marginrm_rejections_total{model="default",reason="would_be_late"} 1.0' in http.get("/metrics").text
