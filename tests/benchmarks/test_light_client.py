"""The reliability runs' client: replies from a real server, and the fault of each kind of missing reply."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from benchmarks.reliability import traffic
from benchmarks.reliability.light_client import LightClient, NoReplyError
from support.server import serving
from support.service import FakeRewardModel

REQUEST = {"items": [{"prompt": "p", "response": "r"}]}
Replying = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(reply: Replying) -> AsyncIterator[str]:
    """A server that handles each connection with a function."""
    server = await asyncio.start_server(reply, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def sending(*parts: bytes, close: bool = False) -> Replying:
    """Replies to each request with these bytes, one part after the other."""

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The loop ends with the client or the test.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while await reader.readuntil(b"\r\n\r\n{}"):
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                if close:
                    break

    return reply


def test_replies_and_refusals_are_read_on_one_connection() -> None:
    async def exchange(url: str) -> list[int]:
        async with LightClient(url, 10) as client:
            fine = await client.post("/score", json.dumps(REQUEST).encode())
            assert json.loads(fine.body)["items"][0]["reward"]
            assert not fine.retry_after
            late = await client.post("/score", json.dumps(REQUEST).encode(), "X-Request-Timeout: soon\r\n")
            assert json.loads(late.body)["error"]["param"] == "X-Request-Timeout"
            assert len(client._idle) == 1
            return [fine.status, late.status]

    with serving(FakeRewardModel()) as server:
        assert asyncio.run(exchange(server.url)) == [200, 422]


def test_retry_after_and_bodies_in_several_parts_are_read() -> None:
    async def exchange() -> None:
        parts = b"HTTP/1.1 429 Too Many", b" Requests\r\nRetry-After: 3\r\ncontent-length: 5\r\n\r\nab", b"cde"
        async with listening(sending(*parts)) as url, LightClient(url, 10) as client:
            for _ in range(2):
                reply = await client.post("/", b"{}")
                assert (reply.status, reply.retry_after, reply.body) == (429, True, b"abcde")

    asyncio.run(exchange())


def test_a_connection_that_the_server_will_close_is_not_used_again() -> None:
    async def exchange() -> None:
        last = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        async with listening(sending(last, close=True)) as url, LightClient(url, 10) as client:
            for _ in range(3):
                assert (await client.post("/", b"{}")).status == 200
            assert not client._idle

    asyncio.run(exchange())


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", b"hello\r\n\r\n"])
def test_an_incomplete_reply_is_a_reset(sent: bytes) -> None:
    async def exchange() -> None:
        async with listening(sending(sent, close=True)) as url, LightClient(url, 10) as client:
            with pytest.raises(NoReplyError) as caught:
                await client.post("/", b"{}")
            assert traffic.transport_fault(caught.value).startswith("reset")

    asyncio.run(exchange())


def test_no_reply_is_a_timeout_and_no_server_a_refusal() -> None:
    async def exchange() -> None:
        async with listening(sending()) as url, LightClient(url, 0.1) as client:
            with pytest.raises(TimeoutError) as caught:
                await client.post("/", b"{}")
            assert traffic.transport_fault(caught.value) == "timeout"
            assert not client._idle  # a late reply must not be read by the next request
            await asyncio.sleep(0.05)  # until the server has noticed
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            async with LightClient(f"http://127.0.0.1:{free.getsockname()[1]}", 10) as client:
                with pytest.raises(ConnectionRefusedError) as refused:
                    await client.post("/", b"{}")
            assert traffic.transport_fault(refused.value) == "refused"

    asyncio.run(exchange())
