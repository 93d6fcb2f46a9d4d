"""Request bodies: compressed ones, and those that stop arriving."""

from __future__ import annotations

import gzip
import json
import socket
import time
import zlib
from collections.abc import Iterator

import httpx
import pytest

from support.server import AppServer, raw_request, serving
from support.service import FakeRewardModel

BODY = json.dumps({"items": [{"prompt": "Hi?", "response": "Yes. " * 20}]}).encode()
MAX_BYTES = 20_000


@pytest.fixture(scope="module")
def server() -> Iterator[AppServer]:
    with serving(FakeRewardModel(), max_body_bytes=MAX_BYTES, body_timeout=0.5) as running:
        yield running


def post(server: AppServer, content: bytes | Iterator[bytes], encoding: str, path: str = "/score") -> httpx.Response:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=120)


def error_of(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert error["request_id"] == response.headers["x-request-id"]
    return response.status_code, error["code"]


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
def test_a_gzip_body_is_scored_like_a_plain_one(server: AppServer, encoding: str) -> None:
    plain = post(server, BODY, "identity")
    assert plain.status_code == 200
    assert post(server, gzip.compress(BODY), encoding).json()["items"] == plain.json()["items"]


def test_a_gzip_body_may_come_in_pieces_and_members(server: AppServer) -> None:
    compressed = gzip.compress(BODY[:50]) + gzip.compress(BODY[50:])
    pieces = (compressed[start : start + 7] for start in range(0, len(compressed), 7))
    assert post(server, pieces, "gzip").status_code == 200


def test_adapters_take_gzip(server: AppServer) -> None:
    assert post(server, gzip.compress(b'{"query": ["text"]}'), "gzip", "/get_reward").status_code == 200


def test_the_limit_holds_after_decompression(server: AppServer) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    assert len(bomb) < MAX_BYTES
    assert error_of(post(server, bomb, "gzip")) == (413, "body_too_large")
    assert post(server, gzip.compress(BODY.ljust(MAX_BYTES)), "gzip").status_code == 200
    assert error_of(post(server, gzip.compress(BODY.ljust(MAX_BYTES + 1)), "gzip")) == (413, "body_too_large")


@pytest.mark.parametrize(
    "content",
    [BODY, gzip.compress(BODY)[:-5], gzip.compress(BODY)[:30], b"", zlib.compress(BODY)],
    ids=["plain", "without its end", "its start", "empty", "zlib"],
)
def test_a_damaged_gzip_body_is_400(server: AppServer, content: bytes) -> None:
    assert error_of(post(server, content, "gzip")) == (400, "malformed_gzip")


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip"])
def test_other_encodings_are_415_with_the_cure(server: AppServer, encoding: str) -> None:
    response = post(server, BODY, encoding)
    assert error_of(response) == (415, "unsupported_encoding")
    assert "gzip" in response.json()["error"]["message"]
    assert response.headers["accept-encoding"] == "gzip, identity"


HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY)


@pytest.mark.parametrize("sent", [0, 10])
def test_a_body_that_stops_is_408_and_the_connection_closes(server: AppServer, sent: int) -> None:
    started = time.monotonic()
    reply = raw_request(server.url, HEAD + BODY[:sent])
    assert 0.5 <= time.monotonic() - started < 8  # `raw_request` returns when the server closes
    assert reply.startswith(b"HTTP/1.1 408")
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"


def test_a_slow_body_is_read(server: AppServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(HEAD)
        for start in range(0, len(BODY), 30):
            time.sleep(0.2)  # 1 s in all
            connection.sendall(BODY[start : start + 30])
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_the_limit_ends_with_the_body() -> None:
    model = FakeRewardModel()
    with serving(model, body_timeout=0.2) as server:
        model.on_forward = lambda _: time.sleep(0.6)
        assert post(server, BODY, "identity").status_code == 200
