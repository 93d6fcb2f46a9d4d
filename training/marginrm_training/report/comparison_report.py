"""Two checkpoints as one self-contained HTML page: metrics, margins, Best-of-N curves, and discordant pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from marginrm.calibration import Floats
from marginrm_training.data.splits import EncodedPair
from marginrm_training.evaluation.best_of_n import BestOfNPoint
from marginrm_training.report import plots
from marginrm_training.report.page import Examples, Section, write_page
from marginrm_training.report.run_report import best_of_n_section

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """The content of a comparison; a part that was not measured is empty.

    Attributes:
        first: Name of the first checkpoint.
        second: Name of the second.
        metrics: As `comparison.compare` and `compare_picks` return them.
        pairs: The pairs that both can read.
        margins: Both models' margins of them, each [pairs].
        curves: Both models' Best-of-N curves.
    """

    first: str
    second: str
    metrics: Mapping[str, float]
    pairs: Sequence[EncodedPair] = ()
    margins: tuple[Floats, Floats] | None = None
    curves: tuple[Sequence[BestOfNPoint], Sequence[BestOfNPoint]] | None = field(default=None)

    def write(self, path: Path) -> None:
        """Writes the file.

        Raises:
            OSError: It cannot be written.
        """
        names = (f"first: {self.first}", f"second: {self.second}")
        sections, examples = [], []
        if self.margins:
            note = "A margin right of 0 agrees with the label. Margins of two models have different scales."
            drawing = plots.margin_distribution(dict(zip(names, self.margins, strict=True)))
            sections.append(Section("Margins", note, [drawing]))
            examples = [self._only("first", *self.margins), self._only("second", *self.margins[::-1])]
        if self.curves:
            sections.append(best_of_n_section(dict(zip(names, self.curves, strict=True))))
        subtitle = "; ".join(names)
        write_page(path, f"{self.first} and {self.second}", subtitle, self.metrics, sections, examples)

    def _only(self, name: str, right: Floats, wrong: Floats) -> Examples:
        """Returns the pairs that only one model ranks right, sorted by the other's margin, the lowest first."""
        found = np.flatnonzero((right > 0) & (wrong <= 0))
        order = found[np.argsort(wrong[found], kind="stable")][:_SHOWN]
        note = f"{len(order)} of {len(found):,} pairs, those first on which the other model is the most wrong."
        return Examples(
            f"Only the {name} is right",
            note,
            [(f"margin {right[index]:.2f}, the other's {wrong[index]:.2f}", self.pairs[int(index)]) for index in order],
        )
