"""What rows of many different lengths cost on a CPU, in time and memory, beside rows that are filled up."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import psutil

from benchmarks.reliability import setup
from benchmarks.reliability.checks import Check, Report
from marginrm import RewardModel
from marginrm.allocator import keep_memory
from marginrm_training.demo.preferences import generate_groups

_KINDS = ("as they are", "filled up")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of forward passes: CPU milliseconds of one, and what the process took more after all of them, in MiB."""

    milliseconds: float
    mebibytes: float


def lengths(passes: int) -> Report:
    """Runs forward passes over rows of many lengths, as they are and filled up, in processes of their own."""
    setup.model_paths()
    found = {
        (dtype, kind): Cost(**json.loads(_run([dtype, str(number), str(passes)])))
        for dtype in ("bfloat16", "float32")
        for number, kind in enumerate(_KINDS)
    }
    facts = {
        f"{dtype}, {kind}": f"{cost.milliseconds:.1f} ms of one core a pass, +{cost.mebibytes:.0f} MiB after {passes}"
        for (dtype, kind), cost in found.items()
    }
    checks = []
    for dtype in ("bfloat16", "float32"):
        bare, filled = (found[dtype, kind] for kind in _KINDS)
        checks.append(
            Check(
                f"{dtype}: filled rows take no more time (5% allowed) and memory",
                f"{filled.milliseconds / bare.milliseconds:.0%} and {filled.mebibytes / bare.mebibytes:.0%}",
                filled.milliseconds <= 1.05 * bare.milliseconds and filled.mebibytes <= bare.mebibytes,
            )
        )
    return Report("Rows of few lengths", f"python -m benchmarks.reliability lengths --passes {passes}", facts, checks)


def _run(arguments: list[str]) -> str:
    command = [sys.executable, "-m", "benchmarks.reliability.lengths", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _measure(dtype: str, kind: int, passes: int) -> Cost:
    path, _ = setup.model_paths()
    model = RewardModel.from_pretrained(path, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    if not kind:
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
    print(json.dumps(asdict(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
