"""The report: one self-contained file with the measures, in which texts of the data are escaped."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from marginrm.encoding import EncodedResponse
from marginrm.texts.preferences import PreferencePair
from marginrm_training.data.splits import EncodedPair
from marginrm_training.evaluation.best_of_n import best_of_n_curve
from marginrm_training.evaluation.pairs import PairRewards, evaluate
from marginrm_training.report import plots
from marginrm_training.report.run_report import Report
from marginrm_training.report.text import lines

HOSTILE = "<script>alert('no')</script>"
HISTORY = [
    {"step": float(step), "loss": 0.7 / step, "accuracy": 0.5 + step / 20, "d_mean": step / 10, "grad_norm": 1.0}
    for step in range(1, 6)
]


def report(**more: object) -> Report:
    generator = np.random.default_rng(0)
    pairs = [
        EncodedPair(
            EncodedResponse((1, index)),
            EncodedResponse((2, index)),
            None,
            PreferencePair(
                [{"role": "user", "content": HOSTILE}], "good" * 2000, f"bad {index}", strength=0.8, source=f"f:{index}"
            ),
        )
        for index in range(60)
    ]
    rewards = PairRewards(generator.normal(1, 1, 60), generator.normal(0, 1, 60))
    metrics = evaluate(rewards, pairs, 1.3)
    return Report("name", "60 pairs", pairs, rewards, 1.3, metrics, **more)  # type: ignore[arg-type]


def test_the_report_is_self_contained_and_escapes_texts(tmp_path: Path) -> None:
    full = report(
        history=HISTORY, before=np.linspace(-1, 1, 60), best_of_n=best_of_n_curve([[1.0, 2.0]], [[0.1, 0.9]], [[3, 4]])
    )
    full.write(tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)|url\((?!#)|@import", html)
    assert HOSTILE not in html
    assert "&lt;script&gt;" in html
    for heading in ("Training", "Margins", "Calibration", "Best-of-N", "The worst mistakes"):
        assert f"<h2>{heading}</h2>" in html
    assert html.count("<svg") == 8
    full.write(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_the_most_confident_mistakes_come_first_and_cut_text_is_counted(tmp_path: Path) -> None:
    made = report()
    made.write(tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    d = made.rewards.d
    shown = [int(found) for found in re.findall(r"&middot; f:(\d+)</summary>", html)]
    assert shown == [int(index) for index in np.argsort(d, kind="stable") if d[index] < 0][:20]
    assert f"of {(d < 0).sum()} pairs" in html
    assert "[4,000 more characters]" in html
    assert f"{made.metrics['accuracy']:.4f}" in html


def test_every_figure_is_a_drawing() -> None:
    drawings = [
        *plots.learning_curves(HISTORY),
        plots.margin_distribution({"one": np.array([0.5])}),
        plots.margin_distribution({"one": np.zeros(3), "two": np.zeros(3)}),
        plots.margin_distribution({name: np.zeros(3) for name in ("one", "two", "three")}),
        plots.estimates({"a": {"one": (0.5, 0.4, 0.6), "two": None}, "b": {"one": None, "two": None}}, zero=("b",)),
        plots.best_of_n_curve({"model": best_of_n_curve([[1.0]], [[0.5]], [[3]])}),
        plots.reliability([], []),
    ]
    for drawing in drawings:
        assert ET.fromstring(drawing).tag.endswith("svg")
    assert plots.strength_bars({"accuracy": 1.0}) is None


def test_metric_lines_have_integer_counts_and_intervals() -> None:
    shown = lines({"pairs": 1200.0, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "mcnemar_p": 1.234e-7})
    assert shown == [("pairs", "1,200"), ("accuracy", "0.5000  [0.4000, 0.6000]"), ("mcnemar_p", "1.2e-07")]
