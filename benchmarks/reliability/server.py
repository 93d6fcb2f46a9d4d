"""The server under test: its checkpoints (the demo's shape with random weights), its process and its memory."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil
from transformers import PreTrainedTokenizerFast

from benchmarks.harness.server import ServerProcess, marginrm_command
from marginrm import RewardModel
from marginrm_training.demo.build import write_demo
from marginrm_training.demo.model import build_model
from marginrm_training.demo.recipe import RECIPE

WORK = Path("runs/reliability")
# The runs repeat few texts, so the reward cache would answer most requests; float32 is compared exactly.
COMPUTED = ("--dtype", "float32", "--reward-cache-mib", "0")
_RSS_SECONDS = 0.5


def model_paths() -> tuple[Path, Path]:
    """Writes two checkpoints that differ in their weights only, unless they exist, and returns their folders."""
    first, second = WORK / "model" / "start", WORK / "model" / "other"
    if not (first / "tokenizer.json").is_file():
        write_demo(WORK / "model")
    if not (second / "tokenizer.json").is_file():
        shutil.copytree(first, second, dirs_exist_ok=True)
        build_model(PreTrainedTokenizerFast.from_pretrained(first), RECIPE, 1).save_pretrained(second)
    return first, second


def reference(path: Path) -> RewardModel:
    """Loads the model whose rewards the server's are compared with."""
    return RewardModel.from_pretrained(path, dtype="float32")


class WatchedServer(ServerProcess):
    """`marginrm serve`, with its memory sampled twice a second.

    Args:
        arguments: Arguments of `marginrm serve`.
        log: File for its output.

    Attributes:
        rss: Samples of (seconds since it was ready, bytes).
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        super().__init__(marginrm_command(*arguments), log, ready="/readyz")
        self.rss: list[tuple[float, int]] = []
        self._stopped = threading.Event()

    def __enter__(self) -> Self:
        """Waits until the server is ready."""
        super().__enter__()
        threading.Thread(target=self._sample_rss, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stops the server."""
        self._stopped.set()
        super().__exit__(*exception)

    @property
    def cpu_seconds(self) -> float:
        """CPU time of its threads so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    @property
    def steps(self) -> tuple[float, float]:
        """The seconds of all of the worker's steps so far, and their number."""
        return self.metric("marginrm_step_seconds_sum"), self.metric("marginrm_step_seconds_count")

    def _sample_rss(self) -> None:
        process, started = psutil.Process(self.process.pid), time.monotonic()
        while not self._stopped.wait(_RSS_SECONDS):
            try:
                self.rss.append((time.monotonic() - started, process.memory_info().rss))
            except psutil.NoSuchProcess:
                return
