"""A run or a measurement as one self-contained HTML file: figures, numbers and the worst mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from marginrm.calibration import Floats, calibrate
from marginrm.ranking import confidence
from marginrm_training.data.splits import EncodedPair
from marginrm_training.evaluation.best_of_n import BestOfNPoint
from marginrm_training.evaluation.pairs import PairRewards
from marginrm_training.report import plots
from marginrm_training.report.page import Examples, Section, write_page

_MISTAKES = 20


@dataclass(frozen=True, slots=True)
class Report:
    """The content of a report.

    Attributes:
        title: The checkpoint's name.
        subtitle: The data.
        pairs: The pairs.
        rewards: The checkpoint's rewards of them.
        temperature: T of its confidence.
        metrics: Metrics by name, as `pairs.evaluate` returns them, with or without intervals.
        history: The learning curve of the training, if there is one.
        before: Margins of the same pairs before training, [pairs].
        best_of_n: The Best-of-N curve, if it was measured.
    """

    title: str
    subtitle: str
    pairs: Sequence[EncodedPair]
    rewards: PairRewards
    temperature: float
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, float]] = ()
    before: Floats | None = None
    best_of_n: Sequence[BestOfNPoint] = field(default=())

    def write(self, path: Path) -> None:
        """Writes the file.

        Raises:
            OSError: It cannot be written.
        """
        write_page(path, self.title, self.subtitle, self.metrics, self._sections(), [self._mistakes()])

    def _sections(self) -> list[Section]:
        d = self.rewards.d
        sections = []
        if self.history:
            note = (
                "Averages between two logs. bt_nll is the Bradley-Terry loss with no margin, the one to compare runs by; "
                "eval_bt_nll and eval_accuracy are of the calibration pairs, whose prompts training never saw."
            )
            sections.append(Section("Training", note, plots.learning_curves(self.history)))
        histogram = (
            plots.margin_distribution({"this checkpoint": d})
            if self.before is None
            else plots.margin_distribution({"before training": self.before, "this checkpoint": d})
        )
        drawings = [histogram, plots.strength_bars(self.metrics), plots.style_bars(self.metrics)]
        note = "A margin right of 0 agrees with the label."
        sections.append(Section("Margins", note, [drawing for drawing in drawings if drawing]))
        bins = [calibrate(d.tolist(), temperature=one).reliability for one in (1.0, self.temperature)]
        note = f"Confidence is sigmoid(|margin| / T), here T = {self.temperature:.3f}."
        sections.append(Section("Calibration", note, [plots.reliability(*bins)]))
        if self.best_of_n:
            sections.append(best_of_n_section({"model": self.best_of_n}))
        return sections

    def _mistakes(self) -> Examples:
        d = self.rewards.d
        order = [int(index) for index in np.argsort(d, kind="stable")[:_MISTAKES] if d[index] < 0]
        note = (
            f"{len(order)} of {(d < 0).sum():,} pairs that are ranked wrong, the most confident first. "
            "A mistake may be the label's."
        )
        return Examples("The worst mistakes", note, [(self._headline(index), self.pairs[index]) for index in order])

    def _headline(self, index: int) -> str:
        chosen, rejected = float(self.rewards.chosen[index]), float(self.rewards.rejected[index])
        wrong = confidence(rejected - chosen, self.temperature)
        strength = self.pairs[index].pair.strength
        label = "" if strength is None else f", strength {strength:.2f}"
        return f"margin {chosen - rejected:.2f} = {chosen:.2f} - {rejected:.2f}, confidence in the other {wrong:.2f}{label}"


def best_of_n_section(curves: Mapping[str, Sequence[BestOfNPoint]]) -> Section:
    """Returns the Best-of-N curves of one or more models on the same prompts, and says where the curves end."""
    last = max(point.n for points in curves.values() for point in points)
    note = (
        "The mean quality of the candidate that is picked among N, over all choices of N candidates; the band is a 95% "
        f"interval over prompts. The curve ends at N = {last}, the last of 1, 2, 4, ... that every prompt has candidates "
        "for."
    )
    return Section("Best-of-N", note, [plots.best_of_n_curve(curves)])
