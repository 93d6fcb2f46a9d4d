"""The metrics equal those that docs/observability.md lists, and include those that the dashboard queries."""

from __future__ import annotations

import re
from pathlib import Path

from marginrm_service.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]


def families() -> dict[str, str]:
    return {f.name: f.type for f in Metrics().collect() if f.name.startswith("marginrm_")}


def test_the_page_lists_every_metric_with_its_type() -> None:
    page = (ROOT / "docs/observability.md").read_text()
    listed = dict(re.findall(r"^\| `(marginrm_\w+)` \| (\w+) \|", page, re.MULTILINE))
    assert listed == {f"{name}_total" if kind == "counter" else name: kind for name, kind in families().items()}


def test_the_dashboard_queries_existing_metrics_only() -> None:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    exist = {name + suffix for name, kind in families().items() for suffix in suffixes.get(kind, ("",))}
    dashboard = (ROOT / "docker/grafana/dashboards/marginrm.json").read_text()
    asked = set(re.findall(r"marginrm_[a-z_]+", dashboard))
    assert asked
    assert asked <= exist
