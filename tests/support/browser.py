"""A real Chromium for the pages' tests, and a tiny checkpoint that has everything a model page shows.

Debian's Chromium is driven by Playwright's client, which downloads no browser of its own. Where one of the two is
missing, the tests are skipped and say which.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from marginrm.calibration import calibrate
from marginrm.manifest import BestOfNMeasure, DataFile, GoldenSample, Manifest, MethodInfo
from marginrm.reward_model import RewardModel
from support.models import tiny_checkpoint

PROMPT = "Why does bread rise?"


def measured_checkpoint(folder: Path, *, seed: int = 0, max_length: int = 512) -> Path:
    """Writes a tiny random model with a whole manifest; its calibration is that of random margins."""
    tiny_checkpoint(folder, "llama", seed=seed, max_length=max_length)
    model = RewardModel.from_pretrained(folder, dtype="float32")
    (reward,) = model.score(PROMPT, ["Yeast eats sugar."])
    sample = model.encoder.encode(PROMPT, "Yeast eats sugar.")
    margins = np.random.default_rng(seed).normal(0.4, 0.6, 600)
    curve = [
        BestOfNMeasure(
            n=n, kl=0.0, model=q, model_low=q - 0.1, model_high=q + 0.1, longest=0.2, oracle=q + 0.2, random=0
        )
        for n, q in ((1, 0.0), (2, 0.3), (4, 0.5))
    ]
    Manifest(
        name="tiny",
        created="2026-01-01T00:00:00Z",
        base_model="tiny-llama",
        method=MethodInfo(preset="margin", loss="paper", scale=1.0, cap=1.0, fire_rate=0.4, mean_target_margin=0.3),
        data=[DataFile(path="/home/ann/train.jsonl", sha256="ab" * 32, rows=700, pairs_used=600)],
        encoding=model.encoder.describe(),
        calibration=calibrate(margins),
        metrics={
            "pairs": 600.0,
            "accuracy": 0.75,
            "accuracy_low": 0.71,
            "accuracy_high": 0.79,
            "accuracy_strength_0.5_0.75": 0.6,
            "accuracy_strength_0.75_1": 0.9,
            "pairs_strength_0.5_0.75": 300.0,
            "pairs_strength_0.75_1": 300.0,
        },
        best_of_n=curve,
        versions={"marginrm": "0.1.0"},
        golden=[GoldenSample(prompt=PROMPT, response="Yeast eats sugar.", ids=list(sample.ids), reward=reward)],
        golden_tolerance={"float32": 1e-3, "bfloat16": 0.5},
    ).save(folder)
    (folder / "README.md").write_text("# A tiny model\n\n<script>alert(1)</script>\n", encoding="utf-8")
    return folder
