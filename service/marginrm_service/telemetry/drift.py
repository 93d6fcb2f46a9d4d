"""Drift: how far the margins that are served have moved from those of the checkpoint's calibration."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from marginrm.model_schema import DriftState

_WINDOW = 10_000  # the last margins, which are compared
_FEWEST = 200  # below, chance alone would look like drift


class Reference:
    """The bins between a manifest's margin quantiles, and the share of margins expected in each.

    Args:
        quantiles: Probability, as text, to margin. Equal margins make one edge.
    """

    def __init__(self, quantiles: Mapping[str, float]) -> None:
        highest = {margin: float(probability) for probability, margin in sorted(quantiles.items(), key=_probability)}
        self.edges = sorted(highest)
        reached = [0.0, *(highest[edge] for edge in self.edges), 1.0]
        self.shares = [after - before for before, after in pairwise(reached)]

    def bin_of(self, margin: float) -> int:
        """Returns the bin of a margin; an edge belongs to the bin below it."""
        return bisect_left(self.edges, margin)


def psi(counts: Sequence[int], shares: Sequence[float]) -> float:
    """Returns the population stability index, sum of (a - e) ln(a / e) over bins, in nats.

    a are the shares of the counts and e those expected. Half a count is added to each bin, so that the index of an
    empty bin is finite. By a rule of thumb from credit scoring (Siddiqi, 2006) a value below 0.1 is stable and one
    above 0.25 a shift.
    """
    total, bins = sum(counts), len(counts)
    actual = [(count + 0.5) / (total + bins / 2) for count in counts]
    expected = [(share * total + 0.5) / (total + bins / 2) for share in shares]
    return math.fsum((a - e) * math.log(a / e) for a, e in zip(actual, expected, strict=True))


class Drift(Collector):
    """The PSI of each model's last margins against its manifest's.

    A model without margin quantiles has no index, and neither has one that has given few margins yet.

    Args:
        name: Name of the metric.
        documentation: Its help text.
    """

    def __init__(self, name: str, documentation: str) -> None:
        self._name = name
        self._documentation = documentation
        self._references: dict[str, Reference] = {}
        self._seen: dict[str, deque[int]] = {}

    def refer(self, model: str, quantiles: Mapping[str, float]) -> None:
        """Starts the index of a model anew; without quantiles the model has none."""
        self.forget(model)
        if quantiles:
            self._references[model] = Reference(quantiles)
            self._seen[model] = deque(maxlen=_WINDOW)

    def forget(self, model: str) -> None:
        """Removes a model."""
        self._references.pop(model, None)
        self._seen.pop(model, None)

    def observe(self, model: str, margins: Iterable[float]) -> None:
        """Records margins of pairs. Call it on the event loop only."""
        reference = self._references.get(model)
        if reference:
            self._seen[model].extend(map(reference.bin_of, margins))

    def describe(self) -> Iterator[Metric]:
        """Names the metric without collecting it."""
        yield GaugeMetricFamily(self._name, self._documentation, labels=["model"])

    def collect(self) -> Iterator[Metric]:
        """Gives each model's index."""
        family = GaugeMetricFamily(self._name, self._documentation, labels=["model"])
        for model in self._references:
            state = self.state(model)
            if state and state.psi is not None:
                family.add_metric([model], state.psi)
        yield family

    def state(self, model: str) -> DriftState | None:
        """Returns a model's last margins beside those expected; None for a model without quantiles."""
        reference = self._references.get(model)
        if reference is None:
            return None
        counts = [0] * len(reference.shares)
        for index in self._seen[model]:
            counts[index] += 1
        total = sum(counts)
        return DriftState(
            margins=total,
            needed=_FEWEST,
            psi=psi(counts, reference.shares) if total >= _FEWEST else None,
            edges=reference.edges,
            expected=reference.shares,
            seen=[count / max(total, 1) for count in counts],
        )


def _probability(item: tuple[str, float]) -> float:
    return float(item[0])
