"""A Prometheus histogram that takes many values at once; prometheus_client's own takes a lock for each value."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Distribution(Collector):
    """A histogram with a label `model`.

    Args:
        name: Name of the metric.
        documentation: Its help text.
        edges: Upper bounds of the buckets, ascending; a bucket without an upper bound is added.
    """

    def __init__(self, name: str, documentation: str, edges: tuple[float, ...]) -> None:
        self._name = name
        self._documentation = documentation
        self._edges = edges
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, values: Iterable[float]) -> None:
        """Counts values. Call it on the event loop only, where /metrics is answered too."""
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
