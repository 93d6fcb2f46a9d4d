"""Label noise: preference pairs with chosen and rejected swapped in a known share of the rows."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

from marginrm.texts.json_lines import read_rows

_log = logging.getLogger(__name__)


def flip_labels(source: Path, target: Path, share: float, seed: int) -> None:
    """Writes the rows of a `.jsonl` file (`.gz` too), with chosen and rejected swapped in exactly this share of them.

    A `strength` stays as it is: the judge is as sure as ever, and wrong. A `true_margin` changes its sign. Rows without
    both responses are written as they are, and those that are not JSON objects are left out and logged.

    Args:
        source: Preference pairs.
        target: The `.jsonl` file to write.
        share: Share of the rows, in [0, 1].
        seed: Seed of the draw.

    Raises:
        DataError: The source cannot be read.
    """
    rows = [row for row, _ in read_rows(source, lambda error: _log.warning("left out: %s", error))]
    pairs = [row for row in rows if row.keys() >= {"chosen", "rejected"}]
    for index in random.Random(f"{seed}:flip").sample(range(len(pairs)), round(share * len(pairs))):
        row = pairs[index]
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        if "true_margin" in row:
            row["true_margin"] = -row["true_margin"]
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
