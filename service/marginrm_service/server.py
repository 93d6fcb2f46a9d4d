"""The process of `marginrm serve`: its socket, its signals and its exit code."""

from __future__ import annotations

import errno
import logging
import socket

import uvicorn

from marginrm.errors import ConfigError
from marginrm_service.app import create_app
from marginrm_service.engine.compute_thread import is_computing
from marginrm_service.graceful import GracefulServer, exit_now
from marginrm_service.settings import Settings
from marginrm_service.state import Service
from marginrm_service.telemetry import logs

_log = logging.getLogger(__name__)
_BACKLOG = 2048


def run(settings: Settings) -> None:
    """Serves until a signal ends it. Returns after an orderly end, so that the process exits with 0.

    The first SIGTERM or SIGINT turns readiness off, finishes accepted requests within the drain time, and returns. A
    second one ends the process at once, with 1.

    Raises:
        ConfigError: The address cannot be listened on.
        ModelError: A model cannot be served.
    """
    logs.configure(settings.log_format, settings.log_level)
    listener = listen(settings.host, settings.port)
    url = address(settings.host, listener.getsockname()[1])

    def announce() -> None:
        _log.info("Ready. Open %s to try it, %s/docs for the API", url, url)

    def leave() -> None:
        server.leave()

    app = create_app(settings, on_ready=announce, on_failure=leave)
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # it would write paths, which are the client's text; RequestContext writes routes
        server_header=False,
        ws="none",
        timeout_keep_alive=75,  # longer than the usual 60 s of load balancers, so that they close first
        timeout_graceful_shutdown=int(settings.drain_seconds) + 1,
    )
    server = GracefulServer(config, service, listener)
    _log.info("Listening on %s; scoring starts when the models are loaded", url)
    server.run(sockets=[listener])
    if service.registry.failure:
        raise service.registry.failure
    if is_computing():
        exit_now(0)


def listen(host: str, port: int) -> socket.socket:
    """Opens the listening socket.

    Raises:
        ConfigError: It cannot be opened; the message has the cure.
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
            errno.EADDRNOTAVAIL: "This machine does not have that address. Use 127.0.0.1 for requests from this machine "
            "only, or 0.0.0.0 for requests from all machines.",
        }
        cure = cures.get(error.errno or 0, "Check that --host is a name or address of this machine.")
        raise ConfigError(f"Cannot listen on {host}:{port} ({error.strerror}). {cure}") from error
    return listener


def address(host: str, port: int) -> str:
    """Returns the URL to open; that of this machine where the server listens on all addresses."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}"
