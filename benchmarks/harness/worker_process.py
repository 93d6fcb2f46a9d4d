"""The parent's side of a worker: starts it, hands out work, and watches what the process tree uses meanwhile."""

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

from benchmarks.harness.groups import Group

ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 900  # seconds; some peers hang where they fail


class ContenderError(Exception):
    """A contender could not be started, or failed; the message is its own."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One timed call.

    Attributes:
        seconds: Wall time of the work itself.
        rewards: One per response.
        computed: Tokens put through the model, or None if the contender does not tell.
        peak_rss: The most memory of the process tree meanwhile, in bytes.
        rss_before: Memory of the worker itself when it had the request and began to score, in bytes.
        gpu_peak: The most memory that torch held on a GPU meanwhile, in bytes; None on CPUs.
        others: Share of all cores that other processes used meanwhile, 0 to 1.
    """

    seconds: float
    rewards: list[float]
    computed: int | None
    peak_rss: int
    rss_before: int
    gpu_peak: int | None
    others: float


class ContenderProcess:
    """A contender in a process of its own.

    Args:
        kind: Module under `benchmarks.throughput.scorers`.
        python: The interpreter of the environment that it needs.
        environment: Variables on top of this process's own.
        patience: Seconds to wait for an answer.
    """

    def __init__(self, kind: str, python: Path, environment: Mapping[str, str], *, patience: float = _PATIENCE) -> None:
        self._kind = kind
        self._patience = patience
        self._log: IO[bytes] = tempfile.NamedTemporaryFile(prefix=f"bench-{kind.rsplit('.', 1)[-1]}-", suffix=".log")  # noqa: SIM115
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

    def load(self, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
        """Loads the model and returns what the contender says of itself."""
        reply = self._ask({"call": "load", "folder": str(folder.resolve()), "options": dict(options)})
        self.loaded_rss = _status_bytes(self._members(), "VmRSS")
        detail: dict[str, Any] = reply["detail"]
        return detail

    def score(self, groups: Sequence[Group]) -> Scored:
        """Scores groups; only the scoring itself is timed."""
        members = self._members()
        for member in members:
            _reset_peak(member)
        used, busy, started = _cpu_seconds(members), _busy_seconds(), time.perf_counter()
        reply = self._ask({"call": "score", "groups": [group.to_json() for group in groups]})
        wall = time.perf_counter() - started
        members = self._members()
        foreign = _busy_seconds() - busy - (_cpu_seconds(members) - used)
        return Scored(
            reply["seconds"],
            reply["rewards"],
            reply["computed"],
            _status_bytes(members, "VmHWM"),
            reply["rss"],
            reply["gpu_peak"],
            max(foreign, 0.0) / wall / (psutil.cpu_count() or 1),
        )

    def call(self, method: str) -> Any:
        """Calls another method of the contender, without arguments."""
        return self._ask({"call": method})["result"]

    def close(self) -> None:
        """Ends the worker and what it started; some peers do not end by themselves."""
        members = self._members()
        for member in members:
            _quietly(member.terminate)
        _, alive = psutil.wait_procs(members, timeout=10)
        for member in alive:
            _quietly(member.kill)
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
            answered, _, _ = select.select([self._process.stdout], [], [], self._patience)
            line = self._process.stdout.readline() if answered else ""
        except BrokenPipeError:
            line = ""
        if not line:
            log = Path(self._log.name).read_text(errors="replace")[-3000:]
            raise ContenderError(
                f"{self._kind} ended, or gave no answer in {self._patience:,.0f} s. The end of its log:\n{log}"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ContenderError(f"{self._kind}: {reply['error']}")
        return reply

    def _members(self) -> list[psutil.Process]:
        try:
            return [self._tree, *self._tree.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _quietly(action: Callable[[], None]) -> None:
    with suppress(psutil.NoSuchProcess):
        action()


def _reset_peak(process: psutil.Process) -> None:
    """Lets the kernel count a process's peak memory anew."""
    with suppress(OSError):  # it has ended
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def _status_bytes(processes: Sequence[psutil.Process], field: str) -> int:
    """Returns the sum of a memory field of /proc/PID/status, in bytes."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            continue  # it has ended
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    return total


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _busy_seconds() -> float:
    """Returns how long all cores together were not idle since the machine started."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
