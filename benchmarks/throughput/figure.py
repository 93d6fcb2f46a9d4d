"""Rewards per second of every contender, a panel for each workload, as an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.throughput.contenders import OURS, OVER_HTTP

_OURS_COLOUR, _OTHERS_COLOUR = "#1f5fa8", "#9aa5b1"


def draw(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the summaries that `report.cells` makes: medians as bars, lowest to highest round as lines.

    Args:
        cells: Summaries; of no measurements nothing is drawn.
        path: Where to write; its ending says in which format.
    """
    panels = list(dict.fromkeys((cell["model"], cell["workload"]) for cell in cells))
    if not panels:
        return
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 0.6 + 2.2 * len(panels)), squeeze=False)
    for axis, (model, workload) in zip(axes[:, 0], panels, strict=True):
        chosen = [cell for cell in cells if (cell["model"], cell["workload"]) == (model, workload)]
        chosen.sort(key=lambda cell: cell["rewards_per_second"]["median"])
        rates = [cell["rewards_per_second"] for cell in chosen]
        names = [cell["contender"] for cell in chosen]
        error = [
            [rate["median"] - rate["low"] for rate in rates],
            [rate["high"] - rate["median"] for rate in rates],
        ]
        colours = [_OURS_COLOUR if name in {OURS, OVER_HTTP} else _OTHERS_COLOUR for name in names]
        axis.barh(names, [rate["median"] for rate in rates], xerr=error, color=colours, height=0.7)
        axis.set_title(f"{model}, {workload}: rewards per second", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
