"""The benchmark of bulk scoring, at a small size: a run that is killed and continued, against a plain loop."""

from __future__ import annotations

from pathlib import Path

from benchmarks.bulk import measure
from support.models import CHATML_TEMPLATE, SENTENCES, tiny_checkpoint


def test_a_killed_run_has_every_row_once_with_the_rewards_of_a_plain_loop(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", "llama", chat_template=CHATML_TEMPLATE)
    loop, killed = measure(model, tmp_path / "out", 160, 8, 4, SENTENCES, ray=False)
    assert (loop.rows, killed.rows) == (8, 160)
    assert killed.difference < 1e-5
    assert min(loop.rate, killed.rate) > 0
