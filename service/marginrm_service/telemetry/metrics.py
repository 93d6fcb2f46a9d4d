"""What Prometheus reads. Each app has its own registry, so that several can live in one process (as tests do).

Names start with `marginrm_` and end with their unit. Labels are models, routes, statuses and error codes, and never
anything that a client sent.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from marginrm.errors import MarginRMError, NonFiniteRewardError
from marginrm.schemas import PairOut, PromptOut
from marginrm_service.engine.coalescing import Reused
from marginrm_service.engine.engine import StepReport
from marginrm_service.engine.request import Answer, Scored
from marginrm_service.telemetry.drift import Drift

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS = (16, 64, 256, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536)
_RESPONSES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024)
_REWARDS = tuple(float(edge) for edge in (-20, -10, -7, -5, -4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 5, 7, 10, 20))
_CONFIDENCES = tuple(step / 20 for step in range(1, 20))


class Metrics:
    """All metrics of one app; attributes are named as in Prometheus, without the prefix.

    Stages of a request are those of `answer.Stages`.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "marginrm_requests", "HTTP requests answered.", ["route", "method", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "marginrm_request_seconds",
            "From the first to the last byte.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "marginrm_stage_seconds",
            "Time of scoring requests by stage.",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejections = Counter(
            "marginrm_rejections", "Scoring requests turned away at the door.", ["model", "reason"], registry=registry
        )
        self.queue_tokens = Gauge(
            "marginrm_queue_tokens", "Tokens that wait or are computed.", ["model"], registry=registry
        )
        self.queue_requests = Gauge(
            "marginrm_queue_requests", "Requests that wait or are computed.", ["model"], registry=registry
        )
        self.step_seconds = Histogram(
            "marginrm_step_seconds", "Time of a step of the worker.", ["model"], buckets=_SECONDS, registry=registry
        )
        self.step_tokens = Histogram(
            "marginrm_step_tokens", "Tokens computed in a step.", ["model"], buckets=_TOKENS, registry=registry
        )
        self.step_responses = Histogram(
            "marginrm_step_responses", "Responses of a step.", ["model"], buckets=_RESPONSES, registry=registry
        )
        self.tokens_asked = Counter(
            "marginrm_tokens_asked",
            "Tokens of responses in steps, each with its whole prompt.",
            ["model"],
            registry=registry,
        )
        self.tokens_computed = Counter(
            "marginrm_tokens_computed", "Tokens that the model computed.", ["model"], registry=registry
        )
        self.reward_cache_hits = Counter(
            "marginrm_reward_cache_hits",
            "Responses whose reward was kept, or was being computed.",
            ["model", "kind"],
            registry=registry,
        )
        self.reward_cache_misses = Counter(
            "marginrm_reward_cache_misses", "Responses that had to be computed.", ["model"], registry=registry
        )
        self.reward_cache_bytes = Gauge(
            "marginrm_reward_cache_bytes", "Memory of the rewards that are kept.", ["model"], registry=registry
        )
        self.forward_faults = Counter(
            "marginrm_forward_faults", "Forward passes that raised or gave no number.", ["model"], registry=registry
        )
        self.item_errors = Counter(
            "marginrm_item_errors", "Responses that got an error and no reward.", ["model", "code"], registry=registry
        )
        self.non_finite_rewards = Counter(
            "marginrm_non_finite_rewards",
            "Responses for which the model gave NaN or infinity.",
            ["model"],
            registry=registry,
        )
        self.truncations = Counter(
            "marginrm_truncations", "Responses whose prompt was cut.", ["model"], registry=registry
        )
        self.ties = Counter("marginrm_ties", "Comparisons too close to call.", ["model"], registry=registry)
        self.ready = Gauge("marginrm_ready", "1 if the model takes requests.", ["model"], registry=registry)
        self.model_info = Gauge(
            "marginrm_model",
            "1 for each model that is served, and what it is.",
            ["model", "revision", "dtype", "forward_path", "calibrated"],
            registry=registry,
        )
        self.rewards = Distribution("marginrm_rewards", "Rewards given.", _REWARDS)
        self.margins = Distribution(
            "marginrm_margins", "Margins of pairs, and of the best over the runner-up.", _REWARDS
        )
        self.confidences = Distribution("marginrm_confidences", "Confidences of those margins.", _CONFIDENCES)
        self.drift = Drift(
            "marginrm_margin_psi", "How far margins of pairs have moved from the manifest's: above 0.25 is a shift."
        )
        registry.register(self.drift)
        for distribution in (self.rewards, self.margins, self.confidences):
            registry.register(distribution)

    def step(self, model: str, report: StepReport) -> None:
        """Takes note of a step of a model's worker."""
        self.step_seconds.labels(model).observe(report.seconds)
        self.step_tokens.labels(model).observe(report.computed)
        self.step_responses.labels(model).observe(report.responses)
        self.tokens_asked.labels(model).inc(report.asked)
        self.tokens_computed.labels(model).inc(report.computed)
        if report.faults:
            self.forward_faults.labels(model).inc(report.faults)

    def reused(self, model: str, reused: Reused) -> None:
        """Takes note of what a scoring request did not have to compute, and of what it had to."""
        self.reward_cache_hits.labels(model, "stored").inc(reused.stored)
        self.reward_cache_hits.labels(model, "in_flight").inc(reused.in_flight)
        self.reward_cache_misses.labels(model).inc(reused.computed)

    def answer(self, model: str, answer: Answer) -> None:
        """Takes note of what came out of a scoring request."""
        for stage, seconds in answer.stages.named().items():
            self.stage_seconds.labels(model, stage).observe(seconds)
        results = [result for row in answer.results for result in row]
        scored = [result for result in results if isinstance(result, Scored)]
        self.rewards.observe(model, [result.reward for result in scored])
        if truncated := sum(result.truncated for result in scored):
            self.truncations.labels(model).inc(truncated)
        if non_finite := sum(isinstance(result, NonFiniteRewardError) for result in results):
            self.non_finite_rewards.labels(model).inc(non_finite)
        for code, count in Counts(error.code for error in results if isinstance(error, MarginRMError)).items():
            self.item_errors.labels(model, code).inc(count)

    def comparisons(self, model: str, outcomes: Sequence[PairOut | PromptOut]) -> None:
        """Takes note of margins and confidences: of pairs, and of the best over the runner-up."""
        self.margins.observe(model, [one.margin for one in outcomes if one.margin is not None])
        self.drift.observe(model, [one.margin for one in outcomes if isinstance(one, PairOut)])
        self.confidences.observe(model, [one.confidence for one in outcomes if one.confidence is not None])
        ties = sum(one.verdict == "tie" if isinstance(one, PairOut) else one.tie for one in outcomes)
        if ties:
            self.ties.labels(model).inc(ties)

    def exposition(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        return generate_latest(self.registry)


class Distribution(Collector):
    """A histogram by model that takes many values at once; prometheus_client's own takes a lock for each.

    Args:
        name: Of the metric.
        documentation: What it counts.
        edges: Upper bounds of the buckets, ascending; one without a bound is added.
    """

    def __init__(self, name: str, documentation: str, edges: tuple[float, ...]) -> None:
        self._name = name
        self._documentation = documentation
        self._edges = edges
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, values: Iterable[float]) -> None:
        """Counts values. Call it on the event loop only, where /metrics is answered, too."""
        counts = self._counts.setdefault(model, [0] * (len(self._edges) + 1))
        total = 0.0
        for value in values:
            counts[bisect_left(self._edges, value)] += 1
            total += value
        self._sums[model] = self._sums.get(model, 0.0) + total

    def describe(self) -> Iterator[Metric]:
        """Names the metric without collecting it."""
        yield HistogramMetricFamily(self._name, self._documentation, labels=["model"])

    def collect(self) -> Iterator[Metric]:
        """Gives the counts in Prometheus' cumulative form."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=["model"])
        for model, counts in self._counts.items():
            running = 0
            buckets = []
            for edge, count in zip([*map(str, self._edges), "+Inf"], counts, strict=True):
                running += count
                buckets.append((edge, running))
            family.add_metric([model], buckets, sum_value=self._sums[model])
        yield family
