"""The metrics of several replicas in one exposition, told apart by the label `replica`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

_LABEL = "replica"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The metrics of one replica at one time."""

    replica: str
    metrics: Sequence[Metric]


def exposition(snapshots: Iterable[Snapshot]) -> bytes:
    """Returns all samples in Prometheus' text format, each metric once."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(list(snapshots)))
    return generate_latest(registry)


class _Merged(Collector):
    """Collects metrics that are given."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._snapshots = snapshots

    def describe(self) -> Iterator[Metric]:
        """Names nothing, so that nothing is collected to register this."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Yields each metric with the samples of all replicas."""
        merged: dict[str, Metric] = {}
        for snapshot in self._snapshots:
            for metric in snapshot.metrics:
                family = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                family.samples += [_labelled(sample, snapshot.replica) for sample in metric.samples]
        yield from merged.values()


def _labelled(sample: Sample, replica: str) -> Sample:
    return sample._replace(labels={**sample.labels, _LABEL: replica})
