"""Metrics by name -> lines for people: counts without decimals, p with two digits, an interval beside its metric."""

from __future__ import annotations

from collections.abc import Mapping

_COUNTS = {
    "pairs",
    "prompts",
    "cases",
    "truncated",
    "unreadable",
    "only_first_right",
    "only_second_right",
    "first_wins",
    "second_wins",
    "draws",
    "same_pick",
}


def lines(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns each metric's name and text; `NAME_low` and `NAME_high` follow NAME in brackets."""
    edges = {f"{name}_{edge}" for name in metrics for edge in ("low", "high")}
    found = []
    for name, value in metrics.items():
        if name in edges:
            continue
        if name in _COUNTS or name.startswith("pairs_"):
            text = f"{value:,.0f}"
        else:
            text = f"{value:.2g}" if name.endswith("_p") else f"{value:.4f}"
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        found.append((name, text if low is None or high is None else f"{text}  [{low:.4f}, {high:.4f}]"))
    return found
