"""The process of one contender: `python -m benchmarks.harness.worker KIND`, JSON lines on stdin and stdout.

It loads its model once and runs as often as the parent asks, so that contenders of different environments can be
interleaved. Only `run` is timed. The process leads a process group of its own and ends the whole group at its end.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

from benchmarks.harness.texts import Sample


class Runner(Protocol):
    """A way to compute rewards, or to train.

    Attributes:
        detail: Dtype, settings and versions, for the report.
        computed: Tokens that the last `run` put through the model, padding included; None if unknown.
    """

    detail: dict[str, Any]

    @property
    def computed(self) -> int | None: ...  # noqa: D102 - see above

    def prepare(self, sample: Sample) -> Any:
        """Brings a sample into the form that `run` takes; not timed."""
        ...

    def run(self, work: Any) -> list[float]:
        """Returns one reward for each response in order, or the loss of each training step; timed."""
        ...


def main() -> None:
    """Answers the parent's requests until stdin ends."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps the output of libraries out of the replies
    worker = _Worker(sys.argv[1])
    while line := sys.stdin.readline():
        try:
            reply = json.dumps(worker.reply(json.loads(line)))
        except Exception:  # noqa: BLE001 - the parent reports any error of a peer and continues
            reply = json.dumps({"error": traceback.format_exc(limit=-4)})
        channel.write(reply + "\n")
        channel.flush()
    # Some peers keep threads or processes that would outlive this one.
    os.killpg(os.getpgrp(), signal.SIGKILL)


class _Worker:
    def __init__(self, kind: str) -> None:
        self._module = importlib.import_module(f"benchmarks.{kind}")
        self._runner: Runner | None = None

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["call"] == "load":
            self._runner = self._module.load(Path(request["folder"]), **request["options"])
            assert self._runner is not None
            return {"detail": self._runner.detail}
        if request["call"] == "imported":
            return {}
        assert self._runner is not None, "load comes first"
        if request["call"] == "run":
            return _timed(self._runner, Sample.from_json(request["sample"]))
        return {"result": getattr(self._runner, request["call"])()}


def _timed(runner: Runner, sample: Sample) -> dict[str, Any]:
    work = runner.prepare(sample)
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    gpu = _gpu()
    gpu_before = gpu.memory_allocated() if gpu else None
    if gpu:
        gpu.reset_peak_memory_stats()
    started = time.perf_counter()
    values = runner.run(work)
    seconds = time.perf_counter() - started  # the values are Python floats, so a GPU has finished
    peak = gpu.max_memory_allocated() if gpu else None
    return {
        "seconds": seconds,
        "values": values,
        "computed": runner.computed,
        "rss_before": rss,
        "gpu_before": gpu_before,
        "gpu_peak": peak,
    }


def _gpu() -> Any:
    """Returns `torch.cuda` if this process computes on a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_available() and torch.cuda.is_initialized() else None


if __name__ == "__main__":
    main()
