"""A uvicorn server that shuts down without resetting a connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
from collections.abc import Iterable
from types import FrameType
from typing import Any

import uvicorn

from marginrm_service.state import Service

_log = logging.getLogger(__name__)

# Seconds, while the server shuts down and connections are open that no request uses:
_QUIET = 0.5  # without a request, after which they are closed
LONGEST_IDLE = 5.0  # after which they are closed in any case
_POLL = 0.005


def exit_now(status: int) -> None:
    """Ends the process while compute threads run.

    Python's own end would wait for some threads, and abort the process at others (`ComputeThread`).
    """
    logging.shutdown()
    os._exit(status)


class GracefulServer(uvicorn.Server):
    """A uvicorn server that answers everything it has accepted, and ends at once at a second signal.

    Args:
        config: The configuration of uvicorn.
        service: The state of the app; readiness is turned off at the first signal.
        listener: The listening socket.
    """

    def __init__(self, config: uvicorn.Config, service: Service, listener: socket.socket) -> None:
        super().__init__(config)
        self._service = service
        self._listener = listener.dup()  # keeps the backlog when uvicorn closes its own
        self._listener.setblocking(False)

    def leave(self) -> None:
        """Begins the shutdown. A second call ends the process without finishing accepted requests."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._service.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shuts down. After a second signal, unfinished requests are answered 503."""
        await self._stop_listening_and_drain_idle()
        await super().shutdown(sockets)
        if self.force_exit:
            tasks = set(self.server_state.tasks)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=1)
            exit_now(1)

    async def _stop_listening_and_drain_idle(self) -> None:
        """Stops listening, and waits for open connections to close after their next reply, which announces it.

        uvicorn would at once close connections that look idle: those whose request is on its way or still unread, and
        those that the kernel has accepted and Python has not. Their clients would see a reset. So idle connections
        stay open until clients have used them, or until no request has come for a while.
        """
        for server in self.servers:
            server.close()
        await self._accept_backlog()
        loop = asyncio.get_running_loop()
        end = loop.time() + min(LONGEST_IDLE, self._service.settings.drain_seconds)
        answered, quiet_since = -1, loop.time()
        while (idle := self._idle()) and loop.time() < end and not self.force_exit:
            if answered != self.server_state.total_requests or any(map(_has_unread, idle)):
                answered, quiet_since = self.server_state.total_requests, loop.time()
            elif loop.time() - quiet_since > _QUIET:
                return
            await asyncio.sleep(_POLL)

    async def _accept_backlog(self) -> None:
        """Accepts the connections that the kernel has accepted; closing the socket before would reset them."""
        arrived = []
        with contextlib.suppress(BlockingIOError):
            while True:
                with contextlib.suppress(ConnectionAbortedError):
                    arrived.append(self._listener.accept()[0])
        self._listener.close()
        loop = asyncio.get_running_loop()
        for connection in arrived:
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        """Returns a new protocol object, as uvicorn makes one for each connection."""
        kind: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = kind(self.config, self.server_state, self.lifespan.state)
        return protocol

    def _idle(self) -> list[Any]:
        """Returns the open connections without a request in progress."""
        connections: Iterable[Any] = self.server_state.connections
        return [
            connection
            for connection in connections
            if (connection.cycle is None or connection.cycle.response_complete)
            and not connection.transport.is_closing()
        ]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles SIGTERM and SIGINT. uvicorn would raise them again at its end, and the process would not exit with 0."""
        action = "exiting now" if self.should_exit else "finishing accepted requests, then exiting"
        _log.info("%s: %s", signal.Signals(sig).name, action)
        self.leave()


def _has_unread(connection: Any) -> bool:
    """Returns whether the kernel holds bytes of a client that Python has not read."""
    poll = select.poll()
    poll.register(connection.transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))
