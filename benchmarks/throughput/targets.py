"""The project's performance targets, checked against the measurements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.harness.rates import Spread, gemm_share, ratios
from benchmarks.models import GEMMA2, MINILM, MINILM_SHAPE, XLM_R_MINILM
from benchmarks.throughput.contenders import (
    ARRIVAL,
    DETERMINISTIC,
    INFINITY,
    OURS,
    OVER_HTTP,
    SENTENCE_TRANSFORMERS,
    SORTED,
    UNCACHED,
    VLLM,
    VLLM_OVER_HTTP,
)
from benchmarks.throughput.results import Measurement, Results

TRAINING = "training"  # the name of the study that `benchmarks.gpu` adds
_LIBRARY = "library_tokens_per_second"
_QWEN3, _PYTHIA, _LLAMA = "qwen3-0.6b", "pythia-2.8b", "llama-3-8b"


@dataclass(frozen=True, slots=True)
class Finding:
    """A target and the measured value.

    Attributes:
        text: The target.
        bound: The value to reach.
        found: The measured value, or None without a measurement.
        most: Whether the bound is an upper one; by default it is a lower one.
    """

    text: str
    bound: float
    found: Spread | None
    most: bool = False

    @property
    def verdict(self) -> str:
        """`reached` if the median reaches the bound, otherwise `missed`; `not measured` without a measurement."""
        if self.found is None:
            return "not measured"
        reached = self.found.median <= self.bound if self.most else self.found.median >= self.bound
        return "reached" if reached else "missed"


class _Found:
    """Looks up the measured values of targets."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def times(
        self, model: str, workload: str, other: str, bound: float, *, own: str = OURS, most: bool = False
    ) -> Finding:
        found = speed_ratio(self._results.measurements, model, workload, own, other)
        return Finding(f"{workload}, {model}: {own}, times {other}", bound, found, most)

    def gemm(self, model: str, bound: float) -> Finding:
        share = Spread.of(gemm_shares(self._results, model, "bon-short"))
        return Finding(f"bon-short, {model}: share of the GEMM rate", bound, share)

    def study(self, text: str, bound: float, name: str, field: str, *, most: bool = True) -> Finding:
        found = [finding for (key, _), finding in self._results.studies.items() if key == name]
        return Finding(text, bound, Spread.of([finding[field] for finding in found if field in finding]), most)


def cpu_findings(results: Results) -> list[Finding]:
    """Returns every target of `benchmarks.run` with the measured value."""
    found = _Found(results)
    return [
        found.times(_QWEN3, "bon-long", VLLM, 1.2, own=OVER_HTTP),
        found.times(_QWEN3, "bon-short", VLLM, 1.05, own=OVER_HTTP),
        found.times(_QWEN3, "pairs", VLLM, 1.05, own=OVER_HTTP),
        found.times(_QWEN3, "trainer", VLLM_OVER_HTTP, 1.1, own=OVER_HTTP),
        found.times(_QWEN3, "trainer-grouped", VLLM_OVER_HTTP, 1.1, own=OVER_HTTP),
        found.times(_QWEN3, "chat", UNCACHED, 3.0, own=OVER_HTTP),
        found.times(_QWEN3, "bon-short", ARRIVAL, 5.0),
        found.times(_QWEN3, "bon-long", ARRIVAL, 12.0),
        found.times(_QWEN3, "bon-short", SORTED, 2.0),
        found.times(_QWEN3, "bon-long", SORTED, 8.0),
        found.times(MINILM, "pairs", f"{SENTENCE_TRANSFORMERS}, float32", 3.0),
        found.times(MINILM, "pairs", f"{SENTENCE_TRANSFORMERS}, bfloat16", 2.0),
        found.times(MINILM, "pairs", f"{INFINITY}, float32", 4.0),
        found.times(MINILM, "pairs", f"{INFINITY}, bfloat16", 2.5),
        found.times(XLM_R_MINILM, "pairs", ARRIVAL, 2.0),
        found.times(GEMMA2, "bon-long", SORTED, 4.0),
        *(
            found.times(_QWEN3, workload, DETERMINISTIC, 2.0, most=True)
            for workload in ("bon-long", "bon-short", "pairs")
        ),
        found.gemm(_QWEN3, 0.60),
        found.study("host: computed tokens/s of the library, 1 core", 1e6, "host", _LIBRARY, most=False),
        found.study("host: over HTTP, 2 cores, 16 clients", 3e5, "host", "http_tokens_per_second", most=False),
        found.study("host: us of planning a computed token", 0.15, "host", "planning_us"),
        found.study("throughput over HTTP / in process, 16 clients", 0.95, "http", "throughput", most=False),
        found.study("ms that HTTP adds to a lone request, p50", 3.0, "http", "added_ms"),
        found.study("N = 64: tokens computed / (64 responses + one prompt)", 1.10, "cost of N", "tokens"),
        found.study("N = 64: seconds per token / those of N = 1", 1.10, "cost of N", "seconds"),
        found.study("batch composition: largest difference of a reward in float32", 1e-5, "composition", "float32"),
        found.study("batch composition: of a deterministic one in bfloat16", 0.0, "composition", "deterministic"),
        found.study("memory of 256 candidates / of 64", 1.10, "memory", "growth"),
    ]


def gpu_findings(results: Results) -> list[Finding]:
    """Returns every target of `benchmarks.gpu` with the measured value."""
    found = _Found(results)
    shares = ((_QWEN3, 0.35), (_PYTHIA, 0.50), (_LLAMA, 0.60))
    return [
        *(found.gemm(model, bound) for model, bound in shares),
        *(found.times(model, "bon-long", SORTED, 6.0) for model, _ in shares),
        *(_training(results, model, 1.5) for model in (MINILM_SHAPE, "smollm2-135m")),
    ]


def _training(results: Results, model: str, bound: float) -> Finding:
    finding = results.studies.get((TRAINING, model), {})
    peers = [name for name in finding.get("ratios", {}) if name.startswith("TRL")]
    ours_times = finding["ratios"].get("marginrm bt, bfloat16") if peers else None
    return Finding(f"training, {model}: times TRL", bound, Spread(**ours_times) if ours_times else None)


def speed_ratio(measurements: Iterable[Measurement], model: str, workload: str, own: str, other: str) -> Spread | None:
    """Returns the rewards per second of our contender `own` over another's, round by round."""
    rates: dict[str, dict[int, float]] = {}
    for m in measurements:
        if (m.model, m.workload) == (model, workload):
            rates.setdefault(m.contender, {})[m.round] = m.rate
    return Spread.of(ratios(rates.get(own, {}), rates.get(other, {})))


def gemm_shares(results: Results, model: str, workload: str, contender: str = OURS) -> list[float]:
    """Returns the share of the GEMM rate in each round whose computed tokens are known."""
    in_process, own = (results.details.get((model, name), {}) for name in (OURS, contender))
    # marginrm skips most of the last layer; its server computes as it does in process.
    computed = own.get("linear_computed") or (in_process.get("linear_computed") if contender.startswith(OURS) else None)
    parameters = computed or in_process.get("linear_parameters")
    cells = [m for m in results.measurements if (m.model, m.workload) == (model, workload)]
    rates = {m.round: m.gemm_rate for m in cells if m.gemm_rate}
    return [
        gemm_share(parameters, m.computed, m.seconds, rates[m.round])
        for m in cells
        if parameters and m.contender == contender and m.computed and m.round in rates
    ]
