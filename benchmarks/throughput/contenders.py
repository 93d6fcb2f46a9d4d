"""The contenders: module, settings and environment of each, and the models and workloads that it takes part in."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness.workloads import WORKLOADS, Workload

OURS = "marginrm"
COMPILED = "marginrm, compiled"
DETERMINISTIC = "marginrm, deterministic"
OVER_HTTP = "marginrm over HTTP"
UNCACHED = "marginrm served, no prefix cache"
ENGINE = "marginrm, engine"
REFERENCE = "loop, float32"
ARRIVAL = "padded, arrival order"
SORTED = "padded, sorted by length"
VLLM = "vLLM, prefix cache"
VLLM_OVER_HTTP = "vLLM over HTTP, prefix cache"
SENTENCE_TRANSFORMERS = "sentence-transformers"
INFINITY = "Infinity"

Use = Literal["comparison", "scaling", "requests"]
_SCORERS = "throughput.scorers."
_VLLM = {"dtype": "bfloat16", "batched_tokens": 4096, "block": 32, "cache_gib": 2}


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """One contender.

    Attributes:
        name: Its name in the report.
        kind: Its module under `benchmarks`.
        options: The options that it is loaded with.
        environment: The Python environment that it needs: ours, or one that an option of the command names.
        limit: The most responses of a sample that it scores; slow contenders score a subset.
        uses: The workloads that it takes part in, by their use.
        architecture: The models that it takes part with; None for all.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Literal["own", "vllm", "infinity", "sentence_transformers"] = "own"
    limit: int | None = None
    uses: tuple[Use, ...] = ("comparison",)
    architecture: Literal["decoder", "encoder"] | None = None

    def takes(self, architecture: str) -> bool:
        """Returns whether it takes part with such models."""
        return self.architecture in {None, architecture}

    def scores(self, workload: Workload) -> bool:
        """Returns whether it takes part in this workload."""
        return workload.use in self.uses


def contenders(device: str = "cpu") -> list[Contender]:
    """Returns all contenders; the first is the reference for the others' rewards.

    Args:
        device: `cpu`, or `cuda` for the contenders that run there.
    """
    padded = {"dtype": "bfloat16", "batch": 16, "device": device}
    looped = {"dtype": "float32", "batch": 1, "order": "arrival", "device": device}
    own = {"device": device}
    batched: tuple[Use, ...] = ("comparison", "scaling")
    decoder: Literal["decoder"] = "decoder"
    return [
        Contender(REFERENCE, f"{_SCORERS}hugging_face", looped, limit=4, uses=("comparison", "requests")),
        Contender(ARRIVAL, f"{_SCORERS}hugging_face", padded | {"order": "arrival"}, limit=16),
        Contender(SORTED, f"{_SCORERS}hugging_face", padded | {"order": "length"}),
        Contender(VLLM, f"{_SCORERS}vllm_offline", _VLLM, "vllm", uses=batched, architecture=decoder),
        *(
            Contender(f"{name}, {dtype}", _SCORERS + module, {"dtype": dtype}, environment, architecture="encoder")
            for name, module, environment in _ENCODER_PEERS
            for dtype in ("float32", "bfloat16")
        ),
        Contender(OURS, f"{_SCORERS}in_process", own, uses=batched),
        Contender(COMPILED, f"{_SCORERS}in_process", own | {"compiled": True}, uses=batched, architecture=decoder),
        Contender(DETERMINISTIC, f"{_SCORERS}in_process", own | {"deterministic": True}),
        Contender(OVER_HTTP, f"{_SCORERS}over_http", own, uses=("comparison", "requests")),
        Contender(
            UNCACHED,
            f"{_SCORERS}over_http",
            own | {"arguments": ("--prefix-cache-mib", "0")},
            uses=("requests",),
            architecture=decoder,
        ),
        Contender(VLLM_OVER_HTTP, f"{_SCORERS}vllm_over_http", _VLLM, "vllm", uses=("requests",), architecture=decoder),
    ]


_ENCODER_PEERS: tuple[tuple[str, str, Literal["infinity", "sentence_transformers"]], ...] = (
    (SENTENCE_TRANSFORMERS, "cross_encoder", "sentence_transformers"),
    (INFINITY, "infinity", "infinity"),
)


def gpu_contenders(device: str = "cuda") -> list[Contender]:
    """Returns the contenders for a machine with a GPU and without peers' environments and web packages.

    Args:
        device: `cuda`, or `cpu` for a rehearsal.
    """
    uses: tuple[Use, ...] = ("comparison", "requests")
    own = {"dtype": "bfloat16", "device": device}
    padded = own | {"batch": 16}
    return [
        Contender(ARRIVAL, f"{_SCORERS}hugging_face", padded | {"order": "arrival"}, limit=64, uses=uses),
        Contender(SORTED, f"{_SCORERS}hugging_face", padded | {"order": "length"}, limit=128, uses=uses),
        Contender(OURS, f"{_SCORERS}in_process", own),
        Contender(ENGINE, f"{_SCORERS}engine", own, uses=("requests",)),
    ]


def parity_contenders(device: str = "cuda") -> list[Contender]:
    """Returns the float32 loop on the CPU, and marginrm on a device in float32 and bfloat16."""
    looped = {"dtype": "float32", "batch": 1, "order": "arrival", "device": "cpu"}
    return [
        Contender(REFERENCE, f"{_SCORERS}hugging_face", looped, limit=8),
        *(
            Contender(f"{OURS}, {dtype}", f"{_SCORERS}in_process", {"device": device, "dtype": dtype}, limit=8)
            for dtype in ("float32", "bfloat16")
        ),
    ]


def ours(workload: str, names: Collection[str]) -> str:
    """Returns the contender among `names` that the others are compared with in a workload."""
    if WORKLOADS[workload].use != "requests":
        return OVER_HTTP if OVER_HTTP in names and OURS not in names else OURS
    return OVER_HTTP if OVER_HTTP in names else ENGINE


def interpreters(**given: Path | None) -> dict[str, Path]:
    """Returns the interpreter of each available environment; `own` is this one."""
    return {"own": Path(sys.executable)} | {name: path for name, path in given.items() if path is not None}


def variables(contender: Contender, python: Path, threads: int) -> dict[str, str]:
    """Returns the environment variables with which a contender runs on this many threads."""
    found = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if contender.environment == "vllm":
        cores = sorted(os.sched_getaffinity(0))[:threads]
        # By default vLLM leaves one core to its scheduler, which on few cores costs more than it saves.
        found["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        found["VLLM_NO_USAGE_STATS"] = "1"
        found["LD_PRELOAD"] = ":".join(map(str, _preloads(python)))
    return found


def _preloads(python: Path) -> list[Path]:
    """Returns the libraries that vLLM's installation page asks to preload, if they are in the environment."""
    libraries = python.parent.parent / "lib"
    return [path for name in ("libtcmalloc_minimal.so.4", "libiomp5.so") if (path := libraries / name).exists()]
