"""A graceful shutdown resets no connection: neither those in the backlog nor those that clients keep open."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable

import pytest
import uvicorn

from marginrm_service.app import create_app
from marginrm_service.graceful import GracefulServer
from marginrm_service.server import listen
from marginrm_service.settings import Settings

REQUEST = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


class Leaving(GracefulServer):
    """A server that is busy with something else at the moment at which it begins to shut down."""

    def __init__(self) -> None:
        listener = listen("127.0.0.1", 0)
        app = create_app(Settings())
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False), app.state.service, listener)
        self._listening = listener
        self._address = listener.getsockname()
        self.at_the_last_moment: Callable[[], None] = lambda: None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.at_the_last_moment()
        await super().shutdown(sockets)

    def connect(self) -> socket.socket:
        return socket.create_connection(self._address, timeout=120)

    def run_with(self, scenario: Callable[[], Awaitable[None]]) -> None:
        async def serve() -> None:
            running = asyncio.create_task(self._serve([self._listening]))
            await until(lambda: self.started)
            await scenario()
            await running

        asyncio.run(serve())


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to that")


async def answer(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""

    def read() -> bytes:
        received = b""
        while part := connection.recv(65536):
            received += part
        return received

    return await asyncio.to_thread(read)


def test_connections_in_the_backlog_are_answered():
    server = Leaving()
    arrived: list[socket.socket] = []

    def arrive() -> None:
        for _ in range(3):
            arrived.append(server.connect())
            arrived[-1].sendall(REQUEST)

    async def scenario() -> None:
        server.at_the_last_moment = arrive
        server.leave()
        await until(lambda: arrived)
        for connection in arrived:
            reply = await answer(connection)
            assert reply.startswith(b"HTTP/1.1 200")
            assert b"connection: close" in reply.lower()
            connection.close()
        with pytest.raises(ConnectionRefusedError):
            server.connect()

    server.run_with(scenario)


def test_kept_connections_stay_until_clients_have_used_them():
    server = Leaving()

    async def scenario() -> None:
        kept = [server.connect() for _ in range(4)]
        await until(lambda: len(server.server_state.connections) == len(kept))
        server.leave()
        for connection in kept:
            await asyncio.sleep(0.3)  # 1.2 s in all, and never half a second of quiet
            connection.sendall(REQUEST)
            assert (await answer(connection)).startswith(b"HTTP/1.1 200")
            connection.close()

    server.run_with(scenario)


def test_unused_connections_do_not_delay_the_shutdown():
    server = Leaving()

    async def scenario() -> None:
        with server.connect() as idle:
            await until(lambda: server.server_state.connections)
            started = time.monotonic()
            server.leave()
            assert await answer(idle) == b""
            assert time.monotonic() - started < 4  # half a second of quiet; 5 s are the most

    server.run_with(scenario)
