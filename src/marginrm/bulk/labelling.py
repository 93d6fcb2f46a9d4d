"""An order in which to label pairs and groups: those that the model is least sure of come first.

The confidence is the calibrated P(the better one is better), widened by the standard deviation of the margin where the
checkpoint has one. Uncertainty sampling (Lewis and Gale 1994, arXiv cmp-lg/9407020) takes what is nearest to 0.5.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from marginrm.atomic_file import replacing
from marginrm.texts.places import read_raw


def write_order(output: Path, column: str | None, target: Path) -> tuple[int, int]:
    """Writes one line for each pair and group of an output, the least certain first.

    A line has `rank` (from 1), `row` (from 0, in the output), `uncertainty` (1 - |2 confidence - 1|, in [0, 1]),
    `confidence`, and `margin_std` where the output has it.

    Args:
        output: The file or folder that `marginrm score` wrote.
        column: The column that holds the results; None if they are the rows.
        target: The JSON Lines file to write.

    Returns:
        The number of ranked rows, and of rows that have no confidence: single responses and errors.

    Raises:
        DataError: The output cannot be read.
    """
    ranked, others = [], 0
    for number, result in enumerate(_results(output, column)):
        confidence = result.get("confidence")
        if confidence is None:
            others += 1
            continue
        row = {"row": number, "uncertainty": 1 - abs(2 * confidence - 1), "confidence": confidence}
        if result.get("margin_std") is not None:
            row["margin_std"] = result["margin_std"]
        ranked.append(row)
    ranked.sort(key=lambda row: (-row["uncertainty"], -row.get("margin_std", 0.0), row["row"]))
    with replacing(target) as fresh, fresh.open("w", encoding="utf-8") as file:
        for rank, row in enumerate(ranked, start=1):
            file.write(json.dumps({"rank": rank, **row}) + "\n")
    return len(ranked), others


def _results(output: Path, column: str | None) -> Iterator[dict[str, Any]]:
    for row, _ in read_raw(str(output)):
        yield row if column is None else row[column]
