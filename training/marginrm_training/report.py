"""A run or a measurement as one HTML file without anything outside it: figures, numbers and the worst mistakes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from marginrm.calibration import calibrate
from marginrm_training import figures
from marginrm_training.best_of_n import BestOfNPoint
from marginrm_training.data import EncodedPair
from marginrm_training.evaluation import PairRewards

_MISTAKES = 20
_SHOWN = 4_000  # characters of one text


@dataclass(frozen=True, slots=True)
class Report:
    """What a report shows.

    Attributes:
        title: The checkpoint.
        subtitle: What it was measured on.
        pairs: The pairs.
        rewards: What the checkpoint gave them.
        temperature: T of its confidence.
        metrics: As `evaluation.evaluate` gives them.
        history: The step log of the training, if it is at hand.
        before: Margins of the same pairs before training, [pairs].
        best_of_n: The curve, if it was measured.
    """

    title: str
    subtitle: str
    pairs: Sequence[EncodedPair]
    rewards: PairRewards
    temperature: float
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, float]] = ()
    before: figures.Floats | None = None
    best_of_n: Sequence[BestOfNPoint] = field(default=())

    def write(self, path: Path) -> None:
        """Writes the file.

        Raises:
            OSError: It cannot be written.
        """
        environment = Environment(
            loader=PackageLoader("marginrm_training", "."), autoescape=True, undefined=StrictUndefined
        )
        d = self.rewards.d
        html = environment.get_template("report.html.j2").render(
            title=self.title,
            subtitle=self.subtitle,
            metrics=[
                (name, f"{value:,.0f}" if name == "pairs" else f"{value:.4f}") for name, value in self.metrics.items()
            ],
            sections=self._sections(),
            mistakes=[self._mistake(int(index)) for index in np.argsort(d, kind="stable")[:_MISTAKES] if d[index] < 0],
            wrong=int((d < 0).sum()),
        )
        path.write_text(html, encoding="utf-8")

    def _sections(self) -> list[tuple[str, str, list[str]]]:
        d = self.rewards.d
        sections = []
        if self.history:
            note = "Averages between two logs. bt_nll is the Bradley-Terry loss with no margin, the one to compare runs by."
            sections.append(("Training", note, [figures.learning_curves(self.history)]))
        drawings = [figures.margin_distribution(d, self.before), figures.strength_bars(self.metrics)]
        note = "A margin right of 0 agrees with the label."
        sections.append(("Margins", note, [drawing for drawing in drawings if drawing]))
        bins = [calibrate(d.tolist(), temperature=one).reliability for one in (1.0, self.temperature)]
        note = f"Confidence is sigmoid(|margin| / T), here T = {self.temperature:.3f}."
        sections.append(("Calibration", note, [figures.reliability(*bins)]))
        if self.best_of_n:
            note = "The mean quality of the candidate that is picked among N, over all choices of N candidates."
            sections.append(("Best-of-N", note, [figures.best_of_n_curve(self.best_of_n)]))
        return sections

    def _mistake(self, index: int) -> dict[str, Any]:
        pair, d = self.pairs[index].pair, float(self.rewards.d[index])
        return {
            "margin": d,
            "confidence": 1 / (1 + math.exp(max(-700.0, d / self.temperature))),
            "strength": pair.strength,
            "source": pair.source,
            "prompt": _text(pair.prompt),
            "chosen": _text(pair.chosen),
            "rejected": _text(pair.rejected),
            "chosen_reward": float(self.rewards.chosen[index]),
            "rejected_reward": float(self.rewards.rejected[index]),
        }


def _text(value: str | Sequence[Mapping[str, str]]) -> str:
    """Returns a text or a dialogue to be read, with what is left out counted."""
    text = value if isinstance(value, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}\n[{len(text) - _SHOWN:,} more characters]"
