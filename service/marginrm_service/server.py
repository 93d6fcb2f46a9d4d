"""The process: a socket, an app, signals, and an end that loses nothing that was accepted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
import signal
import socket
from collections.abc import Iterable
from types import FrameType
from typing import Any

import uvicorn

from marginrm.errors import ConfigError
from marginrm_service.app import create_app
from marginrm_service.engine.compute_thread import computing
from marginrm_service.settings import Settings
from marginrm_service.state import Service
from marginrm_service.telemetry import logs

_log = logging.getLogger(__name__)
_BACKLOG = 2048
# Seconds, while the server leaves and connections are open that no request uses:
_QUIET = 0.5  # without a request before they are closed
_LONGEST_WAIT = 5.0  # until they are closed even so
_GLANCE = 0.005  # between looks at them


def run(settings: Settings) -> None:
    """Serves until a signal ends it. Returns after a clean end, so that the process exits with 0.

    The first SIGTERM or SIGINT turns readiness off, finishes accepted requests within the drain time, and returns; a
    second one ends the process now, with 1.

    Raises:
        ConfigError: The address cannot be listened on.
        ModelError: A model cannot be served.
    """
    logs.configure(settings.log_format, settings.log_level)
    listener = listen(settings.host, settings.port)
    app = create_app(settings)
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # it would write paths, which are the client's text; RequestContext writes routes
        server_header=False,
        ws="none",
        timeout_keep_alive=75,  # longer than the usual 60 s of load balancers, so that they hang up first
        timeout_graceful_shutdown=int(settings.drain_seconds) + 1,
    )
    server = _Server(config, service, listener)
    url = address(settings.host, listener.getsockname()[1])
    _log.info("Listening on %s; scoring starts when the models are loaded", url)
    service.registry.on_failure = server.leave
    service.registry.on_ready = lambda: _log.info("Ready. Open %s to try it, %s/docs for the API", url, url)
    server.run(sockets=[listener])
    if service.registry.failure:
        raise service.registry.failure
    if computing():
        _end_now(0)


def _end_now(status: int) -> None:
    """Ends the process beside threads that compute: Python's own end would wait for some, and abort at others."""
    logging.shutdown()
    os._exit(status)


def listen(host: str, port: int) -> socket.socket:
    """Opens the listening socket.

    Raises:
        ConfigError: It cannot be opened; the message says what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        cures = {
            errno.EADDRINUSE: "Another process listens there: end it, or take another --port (0 takes a free one).",
            errno.EACCES: "Ports below 1024 need rights that this user lacks: take a higher --port.",
            errno.EADDRNOTAVAIL: "This machine has no such address: 127.0.0.1 is for this machine only, 0.0.0.0 for all.",
        }
        cure = cures.get(error.errno or 0, "Is --host a name or address of this machine?")
        raise ConfigError(f"Cannot listen on {host}:{port} ({error.strerror}). {cure}") from error
    return listener


def address(host: str, port: int) -> str:
    """Returns the URL to open: of this machine, where the server listens on all addresses."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}"


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves readiness to us and takes any second signal for "now"."""

    def __init__(self, config: uvicorn.Config, service: Service, listener: socket.socket) -> None:
        super().__init__(config)
        self._service = service
        self._door = listener.dup()  # keeps what has arrived when uvicorn closes its own
        self._door.setblocking(False)

    def leave(self) -> None:
        """Begins the end; called a second time, cuts it short."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._service.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server; after a second signal without waiting for what was accepted, which is told 503."""
        await self._close_the_door()
        await super().shutdown(sockets)
        if self.force_exit:
            tasks = set(self.server_state.tasks)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=1)
            _end_now(1)

    async def _close_the_door(self) -> None:
        """Stops listening, and waits for open connections to close after their next reply, which says so.

        uvicorn would close at once what looks idle: connections whose request is on its way or still unread, and those
        that the kernel has accepted and Python has not. Their clients would see a reset. So idle connections stay until
        clients have used them up, or nothing more has come for a while.
        """
        for server in self.servers:
            server.close()
        await self._take_in_those_at_the_door()
        loop = asyncio.get_running_loop()
        end = loop.time() + min(_LONGEST_WAIT, self._service.settings.drain_seconds)
        answered, quiet_since = -1, loop.time()
        while (idle := self._idle()) and loop.time() < end and not self.force_exit:
            if answered != self.server_state.total_requests or any(map(_has_unread, idle)):
                answered, quiet_since = self.server_state.total_requests, loop.time()
            elif loop.time() - quiet_since > _QUIET:
                return
            await asyncio.sleep(_GLANCE)

    async def _take_in_those_at_the_door(self) -> None:
        """Accepts what the kernel has accepted: closing the socket before would reset those connections."""
        arrived = []
        with contextlib.suppress(BlockingIOError):
            while True:
                with contextlib.suppress(ConnectionAbortedError):
                    arrived.append(self._door.accept()[0])
        self._door.close()
        loop = asyncio.get_running_loop()
        for connection in arrived:
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        """Makes what uvicorn makes for each connection."""
        kind: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = kind(self.config, self.server_state, self.lifespan.state)
        return protocol

    def _idle(self) -> list[Any]:
        """Returns the open connections of which no request is being worked on."""
        connections: Iterable[Any] = self.server_state.connections
        return [
            connection
            for connection in connections
            if (connection.cycle is None or connection.cycle.response_complete)
            and not connection.transport.is_closing()
        ]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes SIGTERM and SIGINT. uvicorn would raise them again at the end, and the process would not exit with 0."""
        _log.info("%s: %s", signal.Signals(sig).name, "leaving now" if self.should_exit else "finishing, then leaving")
        self.leave()


def _has_unread(connection: Any) -> bool:
    """Whether the kernel holds something of a client's that Python has not read."""
    poll = select.poll()
    poll.register(connection.transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))
