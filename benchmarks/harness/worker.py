"""The process that a contender runs in: `python -m benchmarks.harness.worker KIND`, JSON lines on stdin and stdout.

It is loaded once and then called as often as the parent wants, so contenders of different environments can take turns.
Only the work itself is timed: not the transport, nor what `prepare` does. It leads a process group of its own, which ends
with it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.harness.groups import Group


class Contender(Protocol):
    """A way to compute rewards.

    Attributes:
        detail: What the report says of it: dtype, settings, versions.
        computed: Tokens that the last `score` put through the model, padding included; None if unknown.
    """

    detail: dict[str, Any]
    computed: int | None

    def prepare(self, groups: Sequence[Group]) -> Any:
        """Brings the texts or token ids into the form that `score` takes; not timed."""
        ...

    def score(self, work: Any) -> list[float]:
        """Returns one reward per response, groups and responses in order; timed."""
        ...


def main() -> None:
    """Serves one contender until stdin ends."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not come between the replies
    server = _Server(sys.argv[1])
    while line := sys.stdin.readline():
        try:
            reply = json.dumps(server.answer(json.loads(line)))
        except Exception:  # noqa: BLE001 - whatever a peer raises, the parent reports it and goes on
            reply = json.dumps({"error": traceback.format_exc(limit=-4)})
        channel.write(reply + "\n")
        channel.flush()
    # The parent is gone. Some peers keep threads or processes that would outlive it.
    os.killpg(os.getpgrp(), signal.SIGKILL)


class _Server:
    def __init__(self, kind: str) -> None:
        self._module = importlib.import_module(f"benchmarks.{kind}")
        self._contender: Contender | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["call"] == "load":
            self._contender = self._module.load(Path(request["folder"]), **request["options"])
            assert self._contender is not None
            return {"detail": self._contender.detail}
        assert self._contender is not None, "load comes first"
        if request["call"] == "score":
            return _timed(self._contender, [Group.from_json(fields) for fields in request["groups"]])
        return {"result": getattr(self._contender, request["call"])()}


def _timed(contender: Contender, groups: list[Group]) -> dict[str, Any]:
    work = contender.prepare(groups)
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    gpu = _gpu()
    if gpu:
        gpu.reset_peak_memory_stats()
    started = time.perf_counter()
    rewards = contender.score(work)
    seconds = time.perf_counter() - started  # rewards and losses are numbers by now: a GPU has finished
    peak = gpu.max_memory_allocated() if gpu else None
    return {"seconds": seconds, "rewards": rewards, "computed": contender.computed, "rss": rss, "gpu_peak": peak}


def _gpu() -> Any:
    """Returns `torch.cuda` where this process computes on a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_available() and torch.cuda.is_initialized() else None


if __name__ == "__main__":
    main()
