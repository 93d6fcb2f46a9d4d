"""A training report in a real Chromium: its own policy lets its own stylesheet in, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from marginrm.encoding import EncodedResponse
from marginrm.texts.preferences import PreferencePair
from marginrm_training.data.splits import EncodedPair
from marginrm_training.evaluation.best_of_n import best_of_n_curve
from marginrm_training.evaluation.pairs import PairRewards, evaluate
from marginrm_training.report.run_report import Report
from support.browser import chromium, serious, visiting

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOSTILE = "<script>document.title='owned'</script><style>body{display:none}</style>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    pairs = [
        EncodedPair(
            EncodedResponse((1, index)),
            EncodedResponse((2, index)),
            None,
            PreferencePair(HOSTILE, "good", f"bad {index}", strength=0.6 + index / 300, source=f"f:{index}"),
        )
        for index in range(100)
    ]
    rewards = PairRewards(generator.normal(1, 1, 100), generator.normal(0, 1, 100))
    history = [{"step": float(step), "loss": 0.7 / step, "eval_bt_nll": 0.6 / step} for step in range(1, 6)]
    curve = best_of_n_curve([[1.0, 2.0], [2.0, 1.0]], [[0.1, 0.9], [0.3, 0.2]], [[3, 4], [5, 6]])
    path = tmp_path_factory.mktemp("report") / "report.html"
    metrics = evaluate(rewards, pairs, 1.3)
    Report("A run", "100 pairs", pairs, rewards, 1.3, metrics, history, np.linspace(-1, 1, 100), curve).write(path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_looks_as_the_pages_do_and_runs_nothing(browser: Browser, report: Path, scheme: str) -> None:
    with visiting(browser, "file://", str(report), color_scheme=scheme) as visit:
        page = visit.page
        assert page.title() == "A run"
        assert page.locator("svg.figure").count() >= 5
        one = "rgb(31, 111, 92)" if scheme == "light" else "rgb(95, 191, 165)"
        assert page.eval_on_selector(".dot.one", "dot => getComputedStyle(dot).fill") == one
        page.locator("summary").first.click()
        assert HOSTILE in page.inner_text("details[open]")
        assert serious(page) == []
        page.set_viewport_size({"width": 375, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
