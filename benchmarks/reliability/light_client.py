"""A client with little CPU time for each request, because it shares the cores with the server that it loads.

httpx takes about 2 ms of a core for a request: a large part of a core at three times the capacity. This client writes
bytes that were encoded before and reads a status and a body.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RETRY_AFTER = re.compile(rb"\r\nretry-after: *\d", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class NoReplyError(ConnectionError):
    """The connection ended before the reply was complete, or the bytes are not an HTTP reply."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply: its status, whether it has a `Retry-After`, and its body."""

    status: int
    retry_after: bool
    body: bytes


class LightClient:
    """Kept connections to a server, one for each request in flight; an async context manager that closes them.

    Args:
        url: The server's URL; plain HTTP.
        timeout: Seconds for a request.
    """

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._timeout = timeout
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> Self:
        """Connections are opened by the first requests."""
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Closes idle connections."""
        for connection in self._idle:
            connection.close()

    async def post(self, path: str, body: bytes, headers: str = "") -> Reply:
        """Posts JSON.

        Args:
            path: With its leading slash.
            body: The encoded body.
            headers: More headers, as lines that each end with CR LF.

        Raises:
            ConnectionRefusedError: No server listens.
            TimeoutError: The reply did not arrive in time.
            OSError: The connection was reset, or closed without a reply.
        """
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._address[0]}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n{headers}\r\n"
        )
        async with asyncio.timeout(self._timeout):
            connection = await self._connection()
            try:
                reply = await connection.exchange(head.encode() + body)
            except BaseException:  # the reply to a cancelled request must not be read by the next one
                connection.close()
                raise
        if connection.usable:
            self._idle.append(connection)
        return reply

    async def _connection(self) -> _Connection:
        while self._idle:
            if (connection := self._idle.pop()).usable:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, *self._address)
        return connection


class _Connection(asyncio.Protocol):
    """One connection, for one request at a time."""

    def __init__(self) -> None:
        self.usable = True
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._reply: asyncio.Future[Reply] | None = None

    async def exchange(self, message: bytes) -> Reply:
        """Writes a request and waits for its reply."""
        assert self._transport is not None
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        return await self._reply

    def close(self) -> None:
        """Closes the connection."""
        self.usable = False
        if self._transport:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0 or self._reply is None or self._reply.done():
            return
        head = bytes(self._received[: end + 2])
        length = _LENGTH.search(head)
        if length is None or not head.startswith(b"HTTP/1.1 "):
            self._fail(NoReplyError("not an HTTP/1.1 reply with a Content-Length"))
            return
        whole = end + 4 + int(length[1])
        if len(self._received) < whole:
            return
        body = bytes(self._received[end + 4 : whole])
        del self._received[:whole]
        if _CLOSES.search(head):
            self.close()
        self._reply.set_result(Reply(int(head[9:12]), bool(_RETRY_AFTER.search(head)), body))

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(error or NoReplyError("closed without a reply"))

    def _fail(self, error: Exception) -> None:
        self.close()
        if self._reply and not self._reply.done():
            self._reply.set_exception(error)
