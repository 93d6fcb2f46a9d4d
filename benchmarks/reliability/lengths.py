"""The cost of rows of many different lengths on a CPU, in time and memory, beside padded rows of few lengths."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal

import psutil

from benchmarks.reliability.report import Check, Report
from benchmarks.reliability.server import model_paths
from marginrm import RewardModel
from marginrm.allocator import keep_memory
from marginrm_training.demo.preferences import generate_groups

_DTYPES: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
_KINDS = ("unpadded", "padded")


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of forward passes.

    Attributes:
        milliseconds: CPU time of one pass.
        mebibytes: Growth of the process's memory over all passes.
    """

    milliseconds: float
    mebibytes: float


def lengths(passes: int) -> Report:
    """Runs forward passes over rows of many lengths, unpadded and padded to a multiple, in processes of their own.

    Args:
        passes: Forward passes of each kind and dtype.
    """
    model_paths()
    found = {(dtype, kind): Cost(**json.loads(_run(dtype, kind, passes))) for dtype in _DTYPES for kind in _KINDS}
    facts = {
        f"{dtype}, {kind}": f"{cost.milliseconds:.1f} ms of one core a pass, +{cost.mebibytes:.0f} MiB after {passes}"
        for (dtype, kind), cost in found.items()
    }
    checks = []
    for dtype in _DTYPES:
        unpadded, padded = (found[dtype, kind] for kind in _KINDS)
        checks.append(
            Check(
                f"{dtype}: padded rows take no more time (5% allowed) and memory",
                f"{padded.milliseconds / unpadded.milliseconds:.0%} and {padded.mebibytes / unpadded.mebibytes:.0%}",
                padded.milliseconds <= 1.05 * unpadded.milliseconds and padded.mebibytes <= unpadded.mebibytes,
            )
        )
    return Report("Rows of few lengths", f"python -m benchmarks.reliability lengths --passes {passes}", facts, checks)


def _run(dtype: str, kind: str, passes: int) -> str:
    command = [sys.executable, "-m", "benchmarks.reliability.lengths", dtype, kind, str(passes)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _measure(dtype: str, kind: str, passes: int) -> Cost:
    path, _ = model_paths()
    model = RewardModel.from_pretrained(path, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    if kind == "unpadded":
        model.row_multiple = 1
    groups, generator = generate_groups(0), random.Random(0)
    work = []
    for _ in range(passes):
        some = generator.sample(groups, 2)
        work.append(
            [[model.encoder.encode(g.prompt, text) for text in generator.sample(g.candidates, 8)] for g in some]
        )
    model.run_step(work[0])
    before = psutil.Process().memory_info().rss
    started = time.process_time()
    for encoded in work:
        model.run_step(encoded)
    used = time.process_time() - started
    return Cost(used / passes * 1e3, (psutil.Process().memory_info().rss - before) / 2**20)


if __name__ == "__main__":
    keep_memory()
    print(json.dumps(asdict(_measure(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
