"""Prometheus metrics behind verbs; labels and collectors are used nowhere else.

Each app has its own registry, so that several apps can live in one process, as tests do. Names start with `marginrm_` and
end with their unit. Labels are models, routes, statuses and error codes, and never anything that a client sent.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric

from marginrm.confidence.uncertain_reward import familiarity_of
from marginrm.errors import MarginRMError, NonFiniteRewardError
from marginrm.model_schema import DriftState
from marginrm.schemas import ModelCard, PairOut, PromptOut
from marginrm_service.engine.engine import StepReport
from marginrm_service.engine.request import ScoredResponse, ScoringResult
from marginrm_service.errors import DeadlineExceededError, OverloadedError, WouldBeLateError
from marginrm_service.telemetry.distribution import Distribution
from marginrm_service.telemetry.drift import Drift

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4  # of `exposition`
_EVEN = {f"{tenth / 10:g}": tenth / 10 for tenth in range(1, 10)}  # the calibration texts' familiarity, by definition
ANY_MODEL = ""  # label of a refusal that is not about one model

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS = (16, 64, 256, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536)
_RESPONSES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024)
_REWARDS = tuple(float(edge) for edge in (-20, -10, -7, -5, -4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 5, 7, 10, 20))
_CONFIDENCES = tuple(step / 20 for step in range(1, 20))


class Metrics:
    """All metrics of one app, recorded on its event loop."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._make_request_metrics()
        self._make_step_metrics()
        self._make_result_metrics()
        self._make_model_metrics()
        self._info: dict[str, tuple[str, ...]] = {}  # labels of `marginrm_model`, by the model's name

    def _make_request_metrics(self) -> None:
        self._requests = self._counter("requests", "HTTP requests answered.", "route", "method", "status")
        self._request_seconds = self._histogram("request_seconds", "From first to last byte.", _SECONDS, "route")
        self._rejections = self._counter("rejections", "Scoring requests that were refused.", "model", "reason")
        self._stage_seconds = self._histogram(
            "stage_seconds", "Time of scoring requests by stage.", _SECONDS, "model", "stage"
        )

    def _make_step_metrics(self) -> None:
        self._step_seconds = self._histogram("step_seconds", "Time of a step of the worker.", _SECONDS, "model")
        self._step_tokens = self._histogram("step_tokens", "Tokens computed in a step.", _TOKENS, "model")
        self._step_responses = self._histogram("step_responses", "Responses of a step.", _RESPONSES, "model")
        self._tokens_asked = self._counter(
            "tokens_asked", "Tokens of responses in steps, each with its whole prompt.", "model"
        )
        self._tokens_computed = self._counter("tokens_computed", "Tokens that the model computed.", "model")
        self._forward_faults = self._counter(
            "forward_faults", "Forward passes that raised or gave a reward that is not finite.", "model"
        )

    def _make_result_metrics(self) -> None:
        self._cache_hits = self._counter(
            "reward_cache_hits", "Responses whose reward was cached, or being computed.", "model", "kind"
        )
        self._cache_misses = self._counter("reward_cache_misses", "Responses that had to be computed.", "model")
        self._prefix_hits = self._counter("prefix_cache_hits", "Groups whose first tokens were kept.", "model")
        self._prefix_tokens = self._counter(
            "prefix_cache_tokens", "Tokens that were not computed, since earlier steps had.", "model"
        )
        self._prefix_evicted = self._counter(
            "prefix_cache_evicted_tokens", "Tokens that left the prefix cache to make room.", "model"
        )
        self._item_errors = self._counter("item_errors", "Responses that got an error and no reward.", "model", "code")
        self._non_finite_rewards = self._counter(
            "non_finite_rewards", "Responses for which the model gave NaN or infinity.", "model"
        )
        self._truncations = self._counter("truncations", "Responses whose prompt was cut.", "model")
        self._ties = self._counter("ties", "Comparisons too close to call.", "model")
        self._rewards = self._distribution("rewards", "Rewards given.", _REWARDS)
        self._margins = self._distribution("margins", "Margins of pairs, and of the best over the runner-up.", _REWARDS)
        self._confidences = self._distribution("confidences", "Confidences of those margins.", _CONFIDENCES)
        self._drift = Drift(
            "marginrm_margin_psi", "How far margins of pairs have moved from the manifest's: above 0.25 is a shift."
        )
        self._familiarity_drift = Drift(
            "marginrm_familiarity_psi",
            "How far the familiarity of texts has moved from the calibration texts': above 0.25 is a shift.",
        )
        self._registry.register(self._drift)
        self._registry.register(self._familiarity_drift)

    def _make_model_metrics(self) -> None:
        self._ready = self._gauge("ready", "1 if the model takes requests.", "model")
        self._queue_tokens = self._gauge("queue_tokens", "Tokens that wait or are computed.", "model")
        self._queue_requests = self._gauge("queue_requests", "Requests that wait or are computed.", "model")
        self._cache_bytes = self._gauge("reward_cache_bytes", "Memory of the cached rewards.", "model")
        self._compiled = self._gauge("compiled", "1 if the model's layers are compiled.", "model")
        self._prefix_bytes = self._gauge("prefix_cache_bytes", "Memory of the kept prefixes.", "model")
        self._model = self._gauge(
            "model",
            "1 for each model that is served, and what it is.",
            *("model", "revision", "dtype", "forward_path", "calibrated"),
        )

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Records an HTTP request that was answered."""
        self._requests.labels(route, method, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def rejected(self, model: str, reason: str) -> None:
        """Records a scoring request that was refused; `ANY_MODEL` if the refusal is not about one model."""
        self._rejections.labels(model, reason).inc()

    def step_done(self, model: str, report: StepReport) -> None:
        """Records a step of a model's worker."""
        self._step_seconds.labels(model).observe(report.seconds)
        self._step_tokens.labels(model).observe(report.computed)
        self._step_responses.labels(model).observe(report.responses)
        self._tokens_asked.labels(model).inc(report.requested)
        self._tokens_computed.labels(model).inc(report.computed)
        self._prefix_hits.labels(model).inc(report.prefixes.hits)
        self._prefix_tokens.labels(model).inc(report.prefixes.tokens)
        self._prefix_evicted.labels(model).inc(report.prefixes.evicted)
        if report.faults:
            self._forward_faults.labels(model).inc(report.faults)

    def scored(self, result: ScoringResult) -> None:
        """Records the outcome of a scoring request."""
        model = result.model.name
        for stage, seconds in result.timings.by_stage().items():
            self._stage_seconds.labels(model, stage).observe(seconds)
        results = [one for group in result.results for one in group]
        scored = [one for one in results if isinstance(one, ScoredResponse)]
        self._rewards.observe(model, [one.reward for one in scored])
        familiar = [familiarity_of(one.reward) for one in scored]
        self._familiarity_drift.observe(model, [one for one in familiar if one is not None])
        if truncated := sum(one.truncated for one in scored):
            self._truncations.labels(model).inc(truncated)
        if non_finite := sum(isinstance(one, NonFiniteRewardError) for one in results):
            self._non_finite_rewards.labels(model).inc(non_finite)
        for code, count in Counts(error.code for error in results if isinstance(error, MarginRMError)).items():
            self._item_errors.labels(model, code).inc(count)
        if result.reuse:
            self._cache_hits.labels(model, "stored").inc(result.reuse.stored)
            self._cache_hits.labels(model, "in_flight").inc(result.reuse.in_flight)
            self._cache_misses.labels(model).inc(result.reuse.computed)

    def compared(self, model: str, outcomes: Sequence[PairOut | PromptOut]) -> None:
        """Records margins and confidences of pairs, and of the best candidates over the runners-up."""
        self._margins.observe(model, [one.margin for one in outcomes if one.margin is not None])
        self._drift.observe(model, [one.margin for one in outcomes if isinstance(one, PairOut)])
        self._confidences.observe(model, [one.confidence for one in outcomes if one.confidence is not None])
        ties = sum(one.verdict == "tie" if isinstance(one, PairOut) else one.tie for one in outcomes)
        if ties:
            self._ties.labels(model).inc(ties)

    def model_loading(self, name: str) -> None:
        """Records a model that will be served and takes no requests yet."""
        self._ready.labels(name).set(0)
        self._start_at_zero(name)

    def model_loaded(
        self, card: ModelCard, margin_quantiles: Mapping[str, float], *, tells_familiarity: bool = False
    ) -> None:
        """Records a model that is served from now on. It replaces an earlier one of its name.

        Args:
            card: The model's card.
            margin_quantiles: The manifest's, with which margins are compared; empty if there are none.
            tells_familiarity: Whether its rewards carry the familiarity of their texts.
        """
        self._remove_info(card.name)
        labels = card.name, card.revision, card.dtype, card.forward_path, str(card.calibrated).lower()
        self._info[card.name] = labels
        self._model.labels(*labels).set(1)
        self._start_at_zero(card.name)
        self._drift.refer(card.name, margin_quantiles)
        self._familiarity_drift.refer(card.name, _EVEN if tells_familiarity else {})

    def _start_at_zero(self, name: str) -> None:
        """Shows counters of faults before the first fault. An alert on an increase would miss a counter that starts at 1."""
        for counter in (self._forward_faults, self._non_finite_rewards):
            counter.labels(name)
        for error in (OverloadedError, WouldBeLateError, DeadlineExceededError):
            self._rejections.labels(name, error.default_code)

    def model_state(
        self,
        name: str,
        *,
        ready: bool,
        tokens: int,
        requests: int,
        cache_bytes: int,
        prefix_bytes: int,
        compiled: bool,
    ) -> None:
        """Records the present state of a model's queue, caches and layers."""
        self._ready.labels(name).set(ready)
        self._queue_tokens.labels(name).set(tokens)
        self._queue_requests.labels(name).set(requests)
        self._cache_bytes.labels(name).set(cache_bytes)
        self._compiled.labels(name).set(compiled)
        self._prefix_bytes.labels(name).set(prefix_bytes)

    def model_left(self, name: str) -> None:
        """Removes the gauges of a model that is no longer served. Its counters keep their values."""
        self._remove_info(name)
        gauges = self._ready, self._queue_tokens, self._queue_requests
        for gauge in (*gauges, self._cache_bytes, self._prefix_bytes, self._compiled):
            gauge.remove(name)
        self._drift.forget(name)
        self._familiarity_drift.forget(name)

    def drift(self, name: str) -> DriftState | None:
        """Returns a model's last margins beside those expected; None for a model without margin quantiles."""
        return self._drift.state(name)

    def _remove_info(self, name: str) -> None:
        labels = self._info.pop(name, None)
        if labels:
            self._model.remove(*labels)

    def exposition(self) -> bytes:
        """Returns everything in Prometheus' text format, whose media type is `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yields every metric with its samples."""
        yield from self._registry.collect()

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"marginrm_{name}", documentation, labels, registry=self._registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(f"marginrm_{name}", documentation, labels, registry=self._registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"marginrm_{name}", documentation, labels, buckets=buckets, registry=self._registry)

    def _distribution(self, name: str, documentation: str, edges: tuple[float, ...]) -> Distribution:
        distribution = Distribution(f"marginrm_{name}", documentation, edges)
        self._registry.register(distribution)
        return distribution
