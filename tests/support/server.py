"""Real servers on real sockets: an app in a thread with models of the test's choice, or `marginrm serve` as a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import httpx
import uvicorn

from marginrm_service.app import create_app
from marginrm_service.settings import Settings
from marginrm_service.state import Service


class AppServer:
    """An app served by uvicorn in a thread. `service` is its state; call into it with `on_loop`."""

    def __init__(self, app, port: int = 0) -> None:
        self.service: Service = app.state.service
        self._server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, access_log=False))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve()

        asyncio.run(serve())

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def on_loop(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)


@contextlib.contextmanager
def serving(*models, **settings) -> Iterator[AppServer]:
    """Serves fake or real reward models."""
    server = AppServer(create_app(Settings(**settings)), settings.get("port", 0))
    server.start()
    try:
        for model in models:
            server.on_loop(server.service.registry.add(model))
        yield server
    finally:
        server.stop()


class ServerProcess:
    """`marginrm serve` in a process of its own, on a free port, with its log in a file."""

    def __init__(self, log: Path, *arguments: str | Path, env: dict[str, str] | None = None, before: str = "") -> None:
        self.log_path = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"{before}\nfrom marginrm.cli.main import main; main()", "serve", "--port", "0"]
                + [str(argument) for argument in arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})},
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def url(self) -> str:
        """Where it listens; waits until the log says so."""
        while not (found := re.search(r"Listening on (http://\S+?:\d+)", self.log)):
            assert self.process.poll() is None, self.log
            time.sleep(0.02)
        return found[1]

    def wait_until_ready(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while client.get("/readyz").status_code != 200:
                assert self.process.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
                time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def raw_request(url: str, *chunks: bytes, read: bool = True) -> bytes:
    """Sends bytes as they are and returns what comes back until the server closes, or until it is silent for 10 s."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        for chunk in chunks:
            connection.sendall(chunk)
        received = b""
        while read:
            try:
                part = connection.recv(65536)
            except TimeoutError:
                break
            if not part:
                break
            received += part
        return received
