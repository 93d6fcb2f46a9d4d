"""A scoring server as a process: marginrm's own or vLLM's, with its log in a file."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx

_START_SECONDS = 600.0  # vLLM compiles for minutes when it first loads a model
_STOP_SECONDS = 60.0


class ServerProcess:
    """A server on a free port; a context manager that waits until it is ready and stops it at the end.

    Args:
        command: The command; the host and the port are appended.
        log: File for its output.
        ready: Path that answers 200 once the server is ready.
        environment: Variables in addition to those of this process.
    """

    def __init__(
        self, command: Sequence[str], log: Path, *, ready: str, environment: Mapping[str, str] | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._ready = ready
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | dict(environment or {}),
            )

    def __enter__(self) -> Self:
        """Waits until the server is ready.

        Raises:
            RuntimeError: The server has exited, or is not ready in time; the message ends with its log.
        """
        deadline = time.monotonic() + _START_SECONDS
        with httpx.Client(timeout=10) as client:
            while not self._answers(client):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    raise RuntimeError(f"The server did not become ready:\n{self.log[-3000:]}")
                time.sleep(0.05)
        return self

    def __exit__(self, *exception: object) -> None:
        """Sends SIGTERM, and SIGKILL if the process is still alive after a minute."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def log(self) -> str:
        """The output so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def metric(self, name: str) -> float:
        """Returns the sum of a Prometheus metric over its labels; 0 if the server has no such metric."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, values))

    def _answers(self, client: httpx.Client) -> bool:
        try:
            return client.get(self.url + self._ready).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


def marginrm_command(*arguments: str) -> list[str]:
    """Returns the command `marginrm serve` of this environment, to be used with `ready="/readyz"`."""
    return [sys.executable, "-c", "from marginrm.cli.main import main; main()", "serve", *arguments]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
