"""The parent's side of a worker: starts it, sends it work, and measures its process tree meanwhile."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import psutil

from benchmarks.harness.texts import Sample

ROOT = Path(__file__).resolve().parents[2]
_REPLY_SECONDS = 900.0  # some peers hang after an error


class WorkerError(Exception):
    """A worker did not start, or failed; the message holds its own error."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One timed run.

    Attributes:
        seconds: Wall time of the run itself.
        values: One reward for each response, or the loss of each training step.
        computed: Tokens put through the model, or None if unknown.
        peak_rss: Peak memory of the process tree during the run, in bytes.
        rss_before: Memory of the worker itself after it had received the work and before the run, in bytes.
        gpu_before: Memory that torch held on a GPU before the run, in bytes; None on CPUs.
        gpu_peak: Peak memory that torch held on a GPU during the run, in bytes; None on CPUs.
        others: Share of all cores that other processes used during the run, 0 to 1.
    """

    seconds: float
    values: list[float]
    computed: int | None
    peak_rss: int
    rss_before: int
    gpu_before: int | None
    gpu_peak: int | None
    others: float


class WorkerProcess:
    """A contender in a process of its own; a context manager that ends it.

    Args:
        kind: Module under `benchmarks`, such as `throughput.scorers.in_process`.
        python: The interpreter of the environment that it needs.
        environment: Variables in addition to those of this process.
        reply_seconds: Seconds to wait for a reply.

    Attributes:
        loaded_rss: Memory of the process tree right after loading, in bytes.
    """

    def __init__(
        self, kind: str, python: Path, environment: Mapping[str, str], *, reply_seconds: float = _REPLY_SECONDS
    ) -> None:
        self._kind = kind
        self._reply_seconds = reply_seconds
        self._log: IO[bytes] = tempfile.NamedTemporaryFile(prefix=f"benchmark-{kind}-", suffix=".log")  # noqa: SIM115
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "DO_NOT_TRACK": "1"}
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.harness.worker", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env=os.environ | offline | dict(environment),
            text=True,
            start_new_session=True,
        )
        self._tree = psutil.Process(self._process.pid)
        self.loaded_rss = 0

    def wait_for_imports(self) -> None:
        """Waits until the process has imported its module or has ended; the next call reports a failure."""
        with suppress(WorkerError):
            self._ask({"call": "imported"})

    def load(self, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
        """Loads the model and returns the runner's `detail`."""
        reply = self._ask({"call": "load", "folder": str(folder.resolve()), "options": dict(options)})
        self.loaded_rss = _status_bytes(self._members(), "VmRSS")
        detail: dict[str, Any] = reply["detail"]
        return detail

    def run(self, sample: Sample) -> Timed:
        """Runs a sample; only the run itself is timed."""
        members = self._members()
        for member in members:
            _reset_peak(member)
        used, busy, started = _cpu_seconds(members), _busy_seconds(), time.perf_counter()
        reply = self._ask({"call": "run", "sample": sample.to_json()})
        wall = time.perf_counter() - started
        members = self._members()
        foreign = _busy_seconds() - busy - (_cpu_seconds(members) - used)
        return Timed(
            **reply,
            peak_rss=_status_bytes(members, "VmHWM"),
            others=max(foreign, 0.0) / wall / (psutil.cpu_count() or 1),
        )

    def call(self, method: str) -> Any:
        """Calls another method of the runner, without arguments."""
        return self._ask({"call": method})["result"]

    def close(self) -> None:
        """Ends the worker and its child processes; some peers do not end by themselves."""
        members = self._members()
        for member in members:
            _if_alive(member.terminate)
        _, alive = psutil.wait_procs(members, timeout=10)
        for member in alive:
            _if_alive(member.kill)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            replied, _, _ = select.select([self._process.stdout], [], [], self._reply_seconds)
            line = self._process.stdout.readline() if replied else ""
        except BrokenPipeError:
            line = ""
        if not line:
            log = Path(self._log.name).read_text(errors="replace")[-3000:]
            raise WorkerError(
                f"{self._kind} ended, or did not reply within {self._reply_seconds:,.0f} s. The end of its log:\n{log}"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self._kind}: {reply['error']}")
        return reply

    def _members(self) -> list[psutil.Process]:
        try:
            return [self._tree, *self._tree.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _if_alive(action: Callable[[], None]) -> None:
    with suppress(psutil.NoSuchProcess):
        action()


def _reset_peak(process: psutil.Process) -> None:
    """Resets the kernel's record of a process's peak memory."""
    with suppress(OSError):  # the process has ended
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def _status_bytes(processes: Sequence[psutil.Process], field: str) -> int:
    """Returns the sum of a memory field of /proc/PID/status, in bytes."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            continue  # the process has ended
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    return total


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _busy_seconds() -> float:
    """Returns the seconds for which the cores, added up, have not been idle since the machine started."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
