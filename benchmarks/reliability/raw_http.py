"""Malformed HTTP/1.1: damaged requests, and the outcome of a connection that receives one."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from benchmarks.reliability.checks import Outcome

_HANGS = 20.0  # seconds after the client has half-closed the connection
_REPLY_SECONDS = 0.05  # for a reply before the client half-closes
_BODY = b'{"items":[{"prompt":"Why?","response":"Because."}]}'


def malformed(generator: random.Random) -> bytes:
    """Returns a valid request that is damaged in one to three ways."""
    message = _request(generator)
    for _ in range(generator.randint(1, 3)):
        message = generator.choice(_DAMAGES)(message, generator)
    return message


def send(url: str, message: bytes) -> Outcome:
    """Sends a message on a new connection, half-closes it, and reads until the server closes it."""
    parts = urlsplit(url)
    started = time.perf_counter()
    received = b""
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=_HANGS) as connection:
            connection.sendall(message)
            connection.settimeout(_REPLY_SECONDS)
            with contextlib.suppress(TimeoutError):
                received = connection.recv(65536)
            connection.settimeout(_HANGS)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                received += part
    except TimeoutError:
        return Outcome("raw", None, time.perf_counter() - started, "timeout")
    except ConnectionRefusedError:
        return Outcome("raw", None, time.perf_counter() - started, "refused")
    except OSError:
        pass  # the server closed first, a valid reaction to a malformed request
    found = re.match(rb"HTTP/1\.[01] (\d{3})", received)
    worst = max((int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", received)), default=None)
    return Outcome("raw", worst if found else None, time.perf_counter() - started)


def _request(generator: random.Random) -> bytes:
    method, path = generator.choice(
        [(b"POST", b"/score"), (b"POST", b"/best-of-n"), (b"GET", b"/v1/models"), (b"GET", b"/"), (b"GET", b"/metrics")]
    )
    body = _BODY if method == b"POST" else b""
    head = [
        method + b" " + path + b" HTTP/1.1",
        b"Host: x",
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(body),
    ]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def _flip(message: bytes, generator: random.Random) -> bytes:
    changed = bytearray(message)
    for _ in range(generator.randint(1, 8)):
        if changed:
            changed[generator.randrange(len(changed))] = generator.randrange(256)
    return bytes(changed)


def _cut(message: bytes, generator: random.Random) -> bytes:
    return message[: generator.randrange(len(message) + 1)]


def _repeat(message: bytes, generator: random.Random) -> bytes:
    return message * generator.randint(2, 5)


def _header(message: bytes, generator: random.Random) -> bytes:
    """Adds a header that is invalid, repeated, very long, or asks for an unsupported feature."""
    lines = [
        b"Content-Length: -1",
        b"Content-Length: 99999999999999999999",
        b"Content-Length: 0x10",
        b"Content-Length: 5, 6",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: chunked, gzip",
        b"Transfer-Encoding : chunked",
        b"Expect: 100-continue",
        b"Expect: 200-maybe",
        b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13",
        b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk",
        b"Content-Encoding: gzip",
        b"X: " + b"y" * generator.choice((100, 10_000, 100_000)),
        b"".join(b"H%d: v\r\n" % number for number in range(generator.choice((10, 300))))[:-2],
        b" folded: line",
        b": no name",
        b"no colon",
        b"Null: a\0b",
        b"X-Request-ID: \xff\xfe<script>",
        b"X-Request-Timeout: " + generator.choice((b"0", b"-1", b"nan", b"inf", b"1e400", b"soon")),
        b"Authorization: Bearer " + b"\xf0" * 50,
        b"Range: bytes=5-1,-0",
        b"Accept: \x01",
    ]
    first, separator, rest = message.partition(b"\r\n")
    return first + separator + generator.choice(lines) + b"\r\n" + rest


def _first_line(message: bytes, generator: random.Random) -> bytes:
    lines = [
        b"GET / HTTP/9.9",
        b"GET /",
        b"POST http://other.example/score HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"CONNECT x:1 HTTP/1.1",
        b"TRACE / HTTP/1.1",
        b"QUERY /score HTTP/1.1",
        b"PRI * HTTP/2.0",
        b"GET /%00/..%2f..%2fetc/passwd HTTP/1.1",
        b"GET //score?%ff HTTP/1.1",
        b"GET /" + b"a" * generator.choice((1000, 70_000)) + b" HTTP/1.1",
        b"post /score http/1.1",
        b"HEAD /score HTTP/1.0",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the start of a TLS handshake
    ]
    _, separator, rest = message.partition(b"\r\n")
    return generator.choice(lines) + separator + rest


def _line_ends(message: bytes, generator: random.Random) -> bytes:
    return message.replace(b"\r\n", generator.choice((b"\n", b"\r", b"\r\r\n", b"\n\r", b"\0")))


def _chunks(message: bytes, generator: random.Random) -> bytes:
    """Sends the body in chunks of wrong sizes."""
    head, _, body = message.partition(b"\r\n\r\n")
    head = re.sub(rb"\r\nContent-Length: [^\r]*", b"", head) + b"\r\nTransfer-Encoding: chunked"
    size = generator.choice((b"%x" % len(body), b"ffffffffffffffff1", b"-5", b"zz", b"5;ext=" + b"x" * 5000, b""))
    return (
        head
        + b"\r\n\r\n"
        + size
        + b"\r\n"
        + body
        + b"\r\n"
        + generator.choice((b"0\r\n\r\n", b"", b"0\r\nA: b\r\n\r\n"))
    )


def _noise(message: bytes, generator: random.Random) -> bytes:
    return generator.choice(
        (generator.randbytes(generator.randrange(200)) + message, message + generator.randbytes(50))
    )


_DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _cut,
    _repeat,
    _header,
    _header,
    _first_line,
    _line_ends,
    _chunks,
    _noise,
)
