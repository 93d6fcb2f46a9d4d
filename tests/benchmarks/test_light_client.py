"""The reliability runs' client: it reads what the server says, and says what became of a request that got no answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from benchmarks.reliability import traffic
from benchmarks.reliability.light_client import NoReplyError, Wire
from support.server import serving
from support.service import FakeRewardModel

ASK = {"items": [{"prompt": "p", "response": "r"}]}
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(talk: Talk) -> AsyncIterator[str]:
    """A server that says what it is told to."""
    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def saying(*parts: bytes, close: bool = False) -> Talk:
    """Answers each request with these bytes, one piece after the other."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # It ends with the client, or with the test.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while await reader.readuntil(b"\r\n\r\n{}"):
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                if close:
                    break

    return talk


def test_it_reads_answers_and_refusals_on_one_connection() -> None:
    async def ask(url: str) -> list[int]:
        async with Wire(url, 10) as wire:
            fine = await wire.post("/score", json.dumps(ASK).encode())
            assert json.loads(fine.body)["items"][0]["reward"]
            assert not fine.retry_after
            late = await wire.post("/score", json.dumps(ASK).encode(), "X-Request-Timeout: soon\r\n")
            assert json.loads(late.body)["error"]["param"] == "X-Request-Timeout"
            assert len(wire._idle) == 1
            return [fine.status, late.status]

    with serving(FakeRewardModel()) as server:
        assert asyncio.run(ask(server.url)) == [200, 422]


def test_it_sees_retry_after_and_bodies_that_come_in_pieces() -> None:
    async def ask() -> None:
        pieces = b"HTTP/1.1 429 Too Many", b" Requests\r\nRetry-After: 3\r\ncontent-length: 5\r\n\r\nab", b"cde"
        async with listening(saying(*pieces)) as url, Wire(url, 10) as wire:
            for _ in range(2):
                reply = await wire.post("/", b"{}")
                assert (reply.status, reply.retry_after, reply.body) == (429, True, b"abcde")

    asyncio.run(ask())


def test_a_connection_that_the_server_will_close_is_not_used_again() -> None:
    async def ask() -> None:
        last = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        async with listening(saying(last, close=True)) as url, Wire(url, 10) as wire:
            for _ in range(3):
                assert (await wire.post("/", b"{}")).status == 200
            assert not wire._idle

    asyncio.run(ask())


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", b"hello\r\n\r\n"])
def test_no_whole_answer_is_a_reset(said: bytes) -> None:
    async def ask() -> None:
        async with listening(saying(said, close=True)) as url, Wire(url, 10) as wire:
            with pytest.raises(NoReplyError) as caught:
                await wire.post("/", b"{}")
            assert traffic.transport_fault(caught.value).startswith("reset")

    asyncio.run(ask())


def test_silence_is_a_timeout_and_a_closed_door_a_refusal() -> None:
    async def ask() -> None:
        async with listening(saying()) as url, Wire(url, 0.1) as wire:
            with pytest.raises(TimeoutError) as caught:
                await wire.post("/", b"{}")
            assert traffic.transport_fault(caught.value) == "timeout"
            assert not wire._idle  # a late reply is nobody's
            await asyncio.sleep(0.05)  # the server sees it
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            async with Wire(f"http://127.0.0.1:{free.getsockname()[1]}", 10) as wire:
                with pytest.raises(ConnectionRefusedError) as refused:
                    await wire.post("/", b"{}")
            assert traffic.transport_fault(refused.value) == "refused"

    asyncio.run(ask())
