"""`marginrm serve` as a process whose memory is watched."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import httpx
import psutil

_START_SECONDS = 300.0
_SAMPLE_SECONDS = 0.5


class WatchedServer:
    """A server on a free port; a context manager that ends it.

    Args:
        arguments: Of `marginrm serve`.
        log: File of its output.

    Attributes:
        rss: Samples of (seconds since it was ready, bytes).
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "from marginrm.cli.main import main; main()",
                    "serve",
                    "--port",
                    "0",
                    *arguments,
                ],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )
        self.rss: list[tuple[float, int]] = []
        self._watching = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        """Waits until it is ready."""
        try:
            self.url = self._address()
            self._wait_until_ready()
        except BaseException:
            self.process.kill()
            raise
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the process, gently at first."""
        self._watching.set()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def log(self) -> str:
        """What it has written."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def cpu_seconds(self) -> float:
        """The time that its threads have computed so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    @property
    def steps(self) -> tuple[float, float]:
        """The seconds of all of the worker's steps so far, and how many there were."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = dict(re.findall(r"^marginrm_step_seconds_(sum|count)\{.*\} (\S+)$", text, re.MULTILINE))
        return float(found["sum"]), float(found["count"])

    def _address(self) -> str:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"Listening on (http://\S+?:\d+)", self.log):
                return found[1]
            time.sleep(0.05)
        raise RuntimeError(f"The server did not start:\n{self.log}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        with httpx.Client(base_url=self.url, timeout=10) as client:
            while client.get("/readyz").status_code != 200:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"The server did not get ready:\n{self.log}")
                time.sleep(0.05)

    def _watch(self) -> None:
        process, started = psutil.Process(self.process.pid), time.monotonic()
        while not self._watching.wait(_SAMPLE_SECONDS):
            try:
                self.rss.append((time.monotonic() - started, process.memory_info().rss))
            except psutil.NoSuchProcess:
                return
