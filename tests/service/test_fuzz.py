"""A short, seeded slice of `python -m benchmarks.reliability fuzz`: no 500, no hang, and it scores as before."""

from __future__ import annotations

import json
import random
from collections import Counter

import httpx
import pytest

from benchmarks.reliability import fuzz, raw_http
from marginrm import RewardModel
from support.models import tiny_checkpoint
from support.server import serving

QUESTION = {"items": [{"prompt": "Why?", "response": "Because."}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = RewardModel.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("model"), "gpt_neox"), name="default")
    with serving(model) as running:
        expected = model.score("Why?", ["Because."])[0]
        yield running
        after = httpx.post(f"{running.url}/score", json=QUESTION).json()
        assert after["items"][0]["reward"] == pytest.approx(expected, abs=1e-5)
        assert httpx.get(f"{running.url}/readyz").status_code == 200


def test_requests_made_from_the_openapi_document(server):
    outcomes = fuzz.from_schema(server.url, 150)
    assert len(outcomes) >= 150
    assert fuzz.no_faults(outcomes).passed, Counter(outcome.status for outcome in outcomes)
    assert {200, 422} <= {outcome.status for outcome in outcomes}


def test_bodies_that_are_nearly_right(server):
    outcomes = fuzz.bodies(server.url, 200)
    assert fuzz.no_faults(outcomes).passed, Counter(outcome.status for outcome in outcomes)
    assert {400, 422} <= {outcome.status for outcome in outcomes}


def test_malformed_http_over_plain_sockets(server):
    outcomes = fuzz.raw(server.url, 150)
    assert fuzz.no_faults(outcomes).passed, Counter((outcome.status, outcome.fault) for outcome in outcomes)
    assert 400 in {outcome.status for outcome in outcomes}


def test_the_sender_reports_the_answers_of_a_server(server):
    body = json.dumps(QUESTION).encode()
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(
        body
    )
    # Half-closed before the answer, it may count as gone; waited for, it is answered.
    assert raw_http.send(server.url, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").status == 200
    assert raw_http.send(server.url, b"nonsense\r\n\r\n").status == 400
    assert raw_http.send(server.url, head + body).status in {200, None}
    assert raw_http.malformed(random.Random(3)) == raw_http.malformed(random.Random(3))
