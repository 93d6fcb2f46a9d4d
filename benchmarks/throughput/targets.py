"""What the project promised of its speed, checked against what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.harness.rates import Spread, gemm_share, ratios
from benchmarks.models import MINILM
from benchmarks.throughput.contenders import ARRIVAL, DETERMINISTIC, INFINITY, OURS, SENTENCE_TRANSFORMERS, SORTED, VLLM
from benchmarks.throughput.results import Measurement, Results

_QWEN3 = "qwen3-0.6b"


@dataclass(frozen=True, slots=True)
class Finding:
    """A target and what was found.

    Attributes:
        text: The target.
        bound: The value to reach.
        found: What was measured, or None if it was not.
        most: Whether the bound is the most allowed, and not the least.
    """

    text: str
    bound: float
    found: Spread | None
    most: bool = False

    @property
    def verdict(self) -> str:
        """Whether the median reaches the bound."""
        if self.found is None:
            return "not measured"
        reached = self.found.median <= self.bound if self.most else self.found.median >= self.bound
        return "reached" if reached else "missed"


def findings(results: Results) -> list[Finding]:
    """Returns every target with what was found."""

    def ratio(model: str, workload: str, other: str) -> Spread | None:
        return speed_ratio(results.measurements, model, workload, other)

    def study(name: str, field: str) -> Spread | None:
        found = [finding for (key, _), finding in results.studies.items() if key == name]
        return Spread.of([finding[field] for finding in found if field in finding])

    found = [
        Finding(f"{workload}, {_QWEN3}: times {VLLM}", bound, ratio(_QWEN3, workload, VLLM))
        for workload, bound in (("bon-long", 2.5), ("bon-short", 2.0), ("pairs", 2.0))
    ]
    for other, short, long in ((ARRIVAL, 5.0, 12.0), (SORTED, 2.0, 8.0)):
        found.append(Finding(f"bon-short, {_QWEN3}: times {other}", short, ratio(_QWEN3, "bon-short", other)))
        found.append(Finding(f"bon-long, {_QWEN3}: times {other}", long, ratio(_QWEN3, "bon-long", other)))
    for peer in (SENTENCE_TRANSFORMERS, INFINITY):
        for dtype in ("float32", "bfloat16"):
            name = f"{peer}, {dtype}"
            found.append(Finding(f"pairs, {MINILM}: times {name}", 2.0, ratio(MINILM, "pairs", name)))
    for workload in ("bon-long", "bon-short", "pairs"):
        text = f"{workload}, {_QWEN3}: times {DETERMINISTIC}"
        found.append(Finding(text, 2.0, ratio(_QWEN3, workload, DETERMINISTIC), most=True))
    share = Spread.of(gemm_shares(results, _QWEN3, "bon-short"))
    return [
        *found,
        Finding(f"bon-short, {_QWEN3}: share of the GEMM rate", 0.60, share),
        Finding("throughput over HTTP / in process, 16 clients", 0.95, study("http", "throughput")),
        Finding("ms that HTTP adds to a lone request, p50", 3.0, study("http", "added_ms"), most=True),
        Finding("N = 64: tokens computed / (64 responses + one prompt)", 1.10, study("cost of N", "tokens"), most=True),
        Finding("N = 64: seconds per token / those of N = 1", 1.10, study("cost of N", "seconds"), most=True),
        Finding("company: largest difference of a reward in float32", 1e-5, study("company", "float32"), most=True),
        Finding("company: of a deterministic one in bfloat16", 0.0, study("company", "deterministic"), most=True),
        Finding("memory of 256 candidates / of 64", 1.10, study("memory", "growth"), most=True),
    ]


def speed_ratio(measurements: Iterable[Measurement], model: str, workload: str, other: str) -> Spread | None:
    """Returns our rewards per second over another's, round by round."""
    rates: dict[str, dict[int, float]] = {OURS: {}, other: {}}
    for m in measurements:
        if (m.model, m.workload) == (model, workload) and m.contender in rates:
            rates[m.contender][m.round] = m.rate
    return Spread.of(ratios(rates[OURS], rates[other]))


def gemm_shares(results: Results, model: str, workload: str, contender: str = OURS) -> list[float]:
    """Returns the share of the GEMM rate in each round that knows the tokens computed."""
    ours, own = (results.details.get((model, name), {}) for name in (OURS, contender))
    # Ours leave out most of the last layer, and the one over HTTP is the one in process.
    computed = own.get("linear_computed") or (ours.get("linear_computed") if contender.startswith(OURS) else None)
    parameters = computed or ours.get("linear_parameters")
    cells = [m for m in results.measurements if (m.model, m.workload) == (model, workload)]
    rates = {m.round: m.gemm_rate for m in cells if m.gemm_rate}
    return [
        gemm_share(parameters, m.computed, m.seconds, rates[m.round])
        for m in cells
        if parameters and m.contender == contender and m.computed and m.round in rates
    ]
