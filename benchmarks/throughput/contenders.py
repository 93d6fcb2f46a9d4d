"""Who takes part: each contender's module, settings, environment, and the models and workloads that suit it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness.workloads import Workload

OURS = "marginrm"
COMPILED = "marginrm, compiled"
DETERMINISTIC = "marginrm, deterministic"
OVER_HTTP = "marginrm over HTTP"
REFERENCE = "loop, float32"
ARRIVAL = "padded, arrival order"
SORTED = "padded, sorted by length"
VLLM = "vLLM, prefix cache"
SENTENCE_TRANSFORMERS = "sentence-transformers"
INFINITY = "Infinity"
CLIENTS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Entrant:
    """One contender.

    Attributes:
        name: What the report calls it.
        kind: Its module under `benchmarks.throughput.scorers`.
        options: What it is loaded with.
        environment: Which Python it needs: ours, or the one that an option of the command names.
        limit: The most responses that it scores in a portion; the slow ones would take all the time.
        scales: Whether it also takes part in the workloads with other N.
        architecture: Models that it takes part with; None for all.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Literal["own", "vllm", "infinity", "sentence_transformers"] = "own"
    limit: int | None = None
    scales: bool = False
    architecture: Literal["decoder", "encoder"] | None = None

    def takes(self, architecture: str) -> bool:
        """Returns whether it takes part with such models."""
        return self.architecture in {None, architecture}

    def scores(self, workload: Workload) -> bool:
        """Returns whether it takes part in this workload."""
        return self.scales or not workload.scaling


def lineup(device: str = "cpu") -> list[Entrant]:
    """Returns all contenders; the reference, whose rewards the others are compared with, comes first."""
    padded = {"dtype": "bfloat16", "batch": 16, "device": device}
    looped = {"dtype": "float32", "batch": 1, "order": "arrival", "device": device}
    own = {"device": device}
    served = {"batched_tokens": 4096, "block": 32, "cache_gib": 2}
    return [
        Entrant(REFERENCE, "throughput.scorers.hugging_face", looped, limit=4),
        Entrant(ARRIVAL, "throughput.scorers.hugging_face", padded | {"order": "arrival"}, limit=16),
        Entrant(SORTED, "throughput.scorers.hugging_face", padded | {"order": "length"}),
        Entrant(
            VLLM,
            "throughput.scorers.vllm_pooling",
            {"dtype": "bfloat16"} | served,
            "vllm",
            scales=True,
            architecture="decoder",
        ),
        *(
            Entrant(f"{name}, {dtype}", kind, {"dtype": dtype}, environment, architecture="encoder")
            for name, kind, environment in _TEXT_PEERS
            for dtype in ("float32", "bfloat16")
        ),
        Entrant(OURS, "throughput.scorers.in_process", own, scales=True),
        Entrant(
            COMPILED, "throughput.scorers.in_process", own | {"compiled": True}, scales=True, architecture="decoder"
        ),
        Entrant(DETERMINISTIC, "throughput.scorers.in_process", own | {"deterministic": True}),
        Entrant(OVER_HTTP, "throughput.scorers.over_http", own | {"clients": CLIENTS}),
    ]


_TEXT_PEERS: tuple[tuple[str, str, Literal["infinity", "sentence_transformers"]], ...] = (
    (SENTENCE_TRANSFORMERS, "throughput.scorers.cross_encoder", "sentence_transformers"),
    (INFINITY, "throughput.scorers.infinity", "infinity"),
)


def pythons(**given: Path | None) -> dict[str, Path]:
    """Returns the interpreter of each environment that there is; `own` is this one."""
    return {"own": Path(sys.executable)} | {name: path for name, path in given.items() if path is not None}


def variables(entrant: Entrant, python: Path, threads: int) -> dict[str, str]:
    """Returns the environment variables under which a contender runs on this many threads."""
    found = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if entrant.environment == "vllm":
        cores = sorted(os.sched_getaffinity(0))[:threads]
        # By default it leaves one core to its scheduler, which on few cores costs more than it brings.
        found["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        found["VLLM_NO_USAGE_STATS"] = "1"
        found["LD_PRELOAD"] = ":".join(map(str, _preloads(python)))
    return found


def _preloads(python: Path) -> list[Path]:
    """Returns the libraries that vLLM's installation page asks to preload, as far as they are there."""
    libraries = python.parent.parent / "lib"
    return [path for name in ("libtcmalloc_minimal.so.4", "libiomp5.so") if (path := libraries / name).exists()]
