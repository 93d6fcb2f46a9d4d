"""Measurements as JSON lines, appended at once, so that an interrupted run continues from them."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.harness.rates import reward_rate


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contender on one sample.

    Attributes:
        model: Name of the model.
        workload: Name of the workload.
        contender: Name of the contender.
        round: Number of the round; in a round of a workload all contenders score the same texts.
        seconds: Wall time.
        rewards: Responses scored.
        tokens: Requested tokens: every sequence with its prompt, without padding.
        sample_rewards: Responses of the whole sample.
        sample_tokens: Requested tokens of the whole sample.
        computed: Tokens put through the model, or None if unknown.
        peak_memory: Peak memory of the contender's processes meanwhile, in bytes; on a GPU, the memory that torch held there.
        loaded_memory: Memory before, in bytes: right after loading, or on a GPU right before the run.
        others: Share of all cores that other processes used meanwhile.
        gemm_rate: Rate of a large matrix product at that time, FLOP/s; measured by marginrm in process only.
        host_share: Share of the time in which no GPU kernel ran; measured by marginrm in process only.
        difference: Largest difference between a reward and the reference's; None without rewards in common.
        deviation: Standard deviation of the rewards, the scale for the difference.
    """

    model: str
    workload: str
    contender: str
    round: int
    seconds: float
    rewards: int
    tokens: int
    sample_rewards: int
    sample_tokens: int
    computed: int | None
    peak_memory: int
    loaded_memory: int
    others: float
    gemm_rate: float | None = None
    host_share: float | None = None
    difference: float | None = None
    deviation: float | None = None

    @property
    def rate(self) -> float:
        """Rewards per second on the whole sample."""
        return reward_rate(self.seconds, self.tokens, self.sample_tokens, self.sample_rewards)


class Results:
    """The lines of one output file.

    Args:
        path: The file; it is created if it is missing.
        threads: Threads of each contender, for the report.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.measurements: list[Measurement] = []
        self.details: dict[tuple[str, str], dict[str, Any]] = {}
        self.studies: dict[tuple[str, str], dict[str, Any]] = {}
        self.machine: dict[str, Any] = machine() | {"threads": threads}
        for line in self._lines():
            self._take(line)

    def finished(self, model: str, workload: str, number: int, contenders: Iterable[str]) -> bool:
        """Returns whether this round has been measured with all these contenders."""
        measured = {
            m.contender for m in self.measurements if (m.model, m.workload, m.round) == (model, workload, number)
        }
        return set(contenders) <= measured

    def add(self, measurements: Iterable[Measurement]) -> None:
        """Appends the measurements of one round."""
        self._append(*({"kind": "measurement", **asdict(measurement)} for measurement in measurements))

    def add_detail(self, model: str, contender: str, detail: dict[str, Any]) -> None:
        """Appends a contender's settings and versions, or the error that excluded it."""
        self._append({"kind": "detail", "model": model, "contender": contender, "detail": detail})

    def add_study(self, name: str, model: str, findings: dict[str, Any]) -> None:
        """Appends the findings of a study; they replace earlier ones."""
        self._append({"kind": "study", "name": name, "model": model, "findings": findings})

    def _append(self, *lines: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        for line in lines:
            self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        match line.pop("kind"):
            case "measurement":
                self.measurements.append(Measurement(**line))
            case "detail":
                self.details[line["model"], line["contender"]] = line["detail"]
            case "study":
                self.studies[line["name"], line["model"]] = line["findings"]

    def _lines(self) -> Iterator[dict[str, Any]]:
        if self._path.exists():
            for text in self._path.read_text().splitlines():
                yield json.loads(text)


def machine() -> dict[str, Any]:
    """Returns the processors and the versions that the figures depend on."""
    fields = dict(_cpu_fields())
    flags = set(fields.get("flags", "").split())
    return {
        "processor": fields.get("model name", platform.processor()),
        "bf16": sorted(flags & {"amx_bf16", "avx512_bf16"}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_fields() -> Iterator[tuple[str, str]]:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().split("\n\n")[0].splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()
