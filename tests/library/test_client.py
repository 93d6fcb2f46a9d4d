"""The HTTP client against a real server, and against servers that misbehave on purpose on real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from marginrm.client import (
    AsyncRewardClient,
    DeadlineError,
    InvalidRequestError,
    ItemScoreError,
    NotFoundError,
    OverloadedError,
    RewardClient,
    ServerError,
    TransportError,
    UnexpectedReplyError,
)
from marginrm.errors import ConfigError
from support.server import serving
from support.service import FakeRewardModel, Gate

PROMPT = "Why is the sky blue?"
RESPONSES = ["Because air scatters blue light most.", "No idea.", "Ask somebody else."]

Answer = tuple[int, dict[str, str], bytes]


class Arrival(float):
    """Arrival time of a request, in monotonic seconds, with its headers."""

    headers: Message


@contextmanager
def scripted(*answers: Answer) -> Iterator[tuple[str, list[Arrival]]]:
    """Runs an HTTP server that sends these answers in turn and repeats the last; yields its URL and arrival times."""
    arrivals: list[Arrival] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            arrivals.append(Arrival(time.monotonic()))
            arrivals[-1].headers = self.headers
            self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, body = answers[min(len(arrivals), len(answers)) - 1]
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", arrivals
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def refusal(status: int, code: str, **headers: str) -> Answer:
    return status, headers, json.dumps({"error": {"code": code, "message": "no", "request_id": "r1"}}).encode()


def good_reply(rewards: list[float]) -> Answer:
    with serving(FakeRewardModel()) as server, RewardClient(server.url) as client:
        info = client.models()[0]
    ranking = [
        {"candidate": index, "rank": rank, "reward": rewards[index], "p_best": 1 / len(rewards)}
        for rank, index in enumerate(sorted(range(len(rewards)), key=lambda i: -rewards[i]), 1)
    ]
    prompt = {"id": None, "index": 0, "best": ranking[0]["candidate"], "margin": 1.0, "confidence": 0.7, "tie": False}
    body = {
        "model": {
            name: getattr(info, name) for name in ("revision", "base_model", "dtype", "calibrated", "temperature")
        }
        | {"name": "default"},
        "usage": {"responses": len(rewards), "tokens": 9, "tokens_computed": 9},
        "prompts": [prompt | {"ranking": ranking, "mean": 0.0, "std": 1.0}],
    }
    return 200, {}, json.dumps(body).encode()


def test_the_three_verbs_return_the_rewards_of_the_model() -> None:
    model = FakeRewardModel()
    expected = [model.expect(PROMPT, response) for response in RESPONSES]
    with serving(model) as server, RewardClient(server.url) as client:
        assert client.ready()
        assert client.score(PROMPT, RESPONSES) == expected
        assert client.score(PROMPT, []) == []
        comparison = client.compare(PROMPT, RESPONSES[0], RESPONSES[1])
        assert comparison.margin == pytest.approx(expected[0] - expected[1])
        ranking = client.best_of_n(PROMPT, RESPONSES, top_k=1)
        assert ranking.best == max(range(3), key=lambda index: expected[index])
        assert len(ranking.ranking) == 1


def test_async_and_blocking_clients_agree_and_large_calls_are_split() -> None:
    model = FakeRewardModel()
    pairs = [{"prompt": f"{PROMPT} {index}", "chosen": "Yes.", "rejected": f"No {index}."} for index in range(40)]

    async def ask(url: str) -> list[Any]:
        async with AsyncRewardClient(url, batch_size=7) as client:
            return list(await client.score_pairs(pairs))

    with serving(model) as server, RewardClient(server.url, batch_size=64) as client:
        asynchronous = asyncio.run(ask(server.url))
        blocking = client.score_pairs(pairs)
    assert asynchronous == blocking
    expected = [
        model.expect(row["prompt"], row["chosen"]) - model.expect(row["prompt"], row["rejected"]) for row in pairs
    ]
    assert [outcome.margin for outcome in asynchronous] == pytest.approx(expected)


def test_an_unusable_pair_is_an_error_and_its_neighbours_are_scored() -> None:
    pairs = [
        {"prompt": PROMPT, "chosen": "Yes.", "rejected": "No."},
        {"prompt": PROMPT, "chosen": "long " * 600, "rejected": "No."},
        {"prompt": PROMPT, "chosen": "Sure.", "rejected": "No."},
    ]
    with serving(FakeRewardModel()) as server, RewardClient(server.url, batch_size=2) as client:
        outcomes = client.score_pairs(pairs)
        assert [isinstance(outcome, ItemScoreError) for outcome in outcomes] == [False, True, False]
        assert isinstance(outcomes[1], ItemScoreError)
        assert (outcomes[1].index, outcomes[1].code) == (1, "sequence_too_long")
        with pytest.raises(ItemScoreError):
            client.score(PROMPT, ["long " * 600, "No."])
    with (
        serving(FakeRewardModel()) as server,
        RewardClient(server.url, model="other") as client,
        pytest.raises(NotFoundError),
    ):
        client.score(PROMPT, RESPONSES)


def test_a_retry_waits_for_retry_after() -> None:
    answers = (refusal(429, "overloaded", **{"Retry-After": "1"}), good_reply([1.0, 3.0]))
    with scripted(*answers) as (url, arrivals), RewardClient(url, backoff=0.01) as client:
        assert client.score(PROMPT, ["a", "b"]) == [1.0, 3.0]
    assert len(arrivals) == 2
    assert arrivals[1] - arrivals[0] >= 1.0


@pytest.mark.parametrize(
    ("answer", "error", "sent"),
    [
        (refusal(422, "invalid_request"), InvalidRequestError, 1),
        (refusal(500, "internal"), ServerError, 1),
        (refusal(503, "draining", **{"Retry-After": "0"}), OverloadedError, 3),
        ((200, {}, b"<html>a proxy's page</html>"), UnexpectedReplyError, 1),
        ((502, {}, b"<html>bad gateway</html>"), ServerError, 3),
    ],
    ids=["422", "500", "503", "no JSON", "502"],
)
def test_only_temporary_failures_are_retried(answer: Answer, error: type[Exception], sent: int) -> None:
    with scripted(answer) as (url, arrivals), RewardClient(url, max_retries=2, backoff=0.001) as client:
        with pytest.raises(error):
            client.score(PROMPT, RESPONSES)
        assert len(arrivals) == sent


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reply_that_is_still_arriving_at_the_deadline_fails(blocking: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def trickle() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):  # the client closes the connection
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(100):
                    connection.sendall(b" ")
                    time.sleep(0.05)

        thread = threading.Thread(target=trickle)
        thread.start()
        started = time.monotonic()
        with pytest.raises(DeadlineError):
            scored(url, blocking=blocking, deadline=0.5)
        assert time.monotonic() - started < 3
        thread.join()


def scored(url: str, *, blocking: bool, **options: Any) -> list[float]:
    async def ask() -> list[float]:
        async with AsyncRewardClient(url, **options) as client:
            return await client.score(PROMPT, RESPONSES)

    if not blocking:
        return asyncio.run(ask())
    with RewardClient(url, **options) as client:
        return client.score(PROMPT, RESPONSES)


def test_a_silent_and_a_missing_server_are_transport_errors() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # accepts the connection and sends nothing
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with (
            RewardClient(url, timeout=0.2, deadline=0.5, backoff=0.01) as client,
            pytest.raises(DeadlineError),
        ):
            client.score(PROMPT, RESPONSES)
    with RewardClient(url, max_retries=1, backoff=0.001) as client, pytest.raises(TransportError):
        client.score(PROMPT, RESPONSES)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_an_invalid_url_is_refused_by_the_constructor(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url"):
        RewardClient(url)


def test_the_client_imports_no_torch() -> None:
    code = "import sys, marginrm.client; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_try_sends_the_time_that_remains() -> None:
    answers = (refusal(503, "draining", **{"Retry-After": "0"}), refusal(504, "deadline_exceeded"))
    with (
        scripted(*answers) as (url, arrivals),
        RewardClient(url, deadline=1.0, backoff=0.2) as client,
        pytest.raises(DeadlineError),
    ):
        client.score(PROMPT, RESPONSES)
    told = [float(arrival.headers["X-Request-Timeout"]) for arrival in arrivals]
    assert len(told) > 1
    assert 0 < told[-1] < told[1] < told[0] <= 1.0


def test_work_of_a_client_that_gave_up_is_cancelled() -> None:
    gate = Gate()
    model = FakeRewardModel()
    with serving(model) as server, RewardClient(server.url, deadline=0.4, backoff=0.01) as client:
        model.on_forward = gate
        with pytest.raises(DeadlineError):
            client.score(PROMPT, RESPONSES)
        model.on_forward = lambda _: None
        gate.open()
        assert client.score(PROMPT, RESPONSES) == [model.expect(PROMPT, response) for response in RESPONSES]
        assert server.service.registry.get("default").queue_state().tokens == 0


GROUPS = [
    {"prompt": f"Question {number}?", "candidates": [f"Answer {number}.{index}" for index in range(count)]}
    for number, count in enumerate((3, 9, 1, 4, 2, 7))
]


def test_streamed_rankings_equal_plain_rankings() -> None:
    async def collected(url: str) -> dict[int, Any]:
        async with AsyncRewardClient(url, batch_size=8) as client:
            return {index: outcome async for index, outcome in client.best_of_n_stream(GROUPS, top_k=2)}

    with serving(FakeRewardModel()) as server, RewardClient(server.url, batch_size=8) as client:
        plain = client.best_of_n_many(GROUPS[:1] + GROUPS[2:], top_k=2)
        streamed = dict(client.best_of_n_stream(GROUPS, top_k=2))
        assert [streamed[index] for index in (0, 2, 3, 4, 5)] == plain
        assert asyncio.run(collected(server.url)) == streamed


def test_after_a_broken_stream_only_missing_groups_are_sent() -> None:
    with serving(FakeRewardModel()) as server:
        body = {"prompts": GROUPS}
        whole = httpx.post(f"{server.url}/best-of-n", json=body, headers={"Accept": "application/x-ndjson"}).content
        with RewardClient(server.url) as client:
            expected = dict(client.best_of_n_stream(GROUPS))
            with httpx.Client() as plain:
                rest = {"prompts": [GROUPS[index] for index in (2, 3, 4, 5)]}
                accept = {"Accept": "application/x-ndjson"}
                second = plain.post(f"{server.url}/best-of-n", json=rest, headers=accept).content
    lines = {json.loads(line).get("index"): line + b"\n" for line in whole.splitlines()}
    broken = lines[0] + lines[1] + lines[2][:20]  # and no more
    with scripted((200, {}, broken), (200, {}, second)) as (url, arrivals), RewardClient(url, backoff=0.01) as client:
        assert dict(client.best_of_n_stream(GROUPS)) == expected
        assert len(arrivals) == 2


def test_an_error_in_mid_stream_is_raised_with_its_status() -> None:
    late = json.dumps({"status": 422, "error": {"code": "odd", "message": "no", "request_id": "r"}}).encode() + b"\n"
    with (
        scripted((200, {}, late)) as (url, _),
        RewardClient(url) as client,
        pytest.raises(InvalidRequestError, match="odd"),
    ):
        list(client.best_of_n_stream(GROUPS))


def test_a_group_in_several_requests_is_ranked_as_in_one() -> None:
    candidates = [f"Candidate {number}" for number in range(50)]
    with (
        serving(FakeRewardModel()) as server,
        RewardClient(server.url) as whole,
        RewardClient(server.url, batch_size=7, concurrency=3) as parts,
    ):
        expected = whole.best_of_n(PROMPT, candidates, top_k=5)
        found = parts.best_of_n(PROMPT, candidates, top_k=5)
        assert found.best == expected.best
        assert [(one.candidate, one.rank, one.reward) for one in found.ranking] == [
            (one.candidate, one.rank, one.reward) for one in expected.ranking
        ]
        assert found.mean == pytest.approx(expected.mean)
        assert parts.score(PROMPT, candidates) == whole.score(PROMPT, candidates)
        with pytest.raises(ItemScoreError) as raised:
            parts.score(PROMPT, [*candidates, "word " * 5000])
    assert raised.value.index == 0
    assert "50" in str(raised.value)


def test_a_failed_request_names_its_items() -> None:
    pairs = [{"prompt": PROMPT, "chosen": "a", "rejected": "b"}] * 10
    with (
        scripted(refusal(500, "broken")) as (url, _),
        RewardClient(url, batch_size=4, concurrency=2) as client,
        pytest.raises(ServerError) as raised,
    ):
        client.score_pairs(pairs)
    assert "pairs 0 to 1" in raised.value.__notes__[0]
