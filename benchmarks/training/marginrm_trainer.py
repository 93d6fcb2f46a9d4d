"""marginrm's training loop on pairs of token ids: packed rows, with the prompt shared by chosen and rejected."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness.texts import Sample
from marginrm.allocator import keep_memory
from marginrm.encoding import EncodedResponse
from marginrm.loading import load_for_training
from marginrm.texts.preferences import PreferencePair
from marginrm_training.config import parse_config
from marginrm_training.data.splits import EncodedPair
from marginrm_training.run.train import tune_for_training
from marginrm_training.run.trainer import MarginTrainer


class MarginrmTrainer:
    """`MarginTrainer`; each sample is one training run, and the next continues with its weights.

    Args:
        folder: The model.
        dtype: Dtype of matrix products.
        batch: Pairs per forward pass and per step.
        preset: The margin method.
    """

    def __init__(self, folder: Path, *, dtype: str, batch: int, preset: str) -> None:
        keep_memory()
        self._module, _ = load_for_training(str(folder), seed=0)
        self._directory = tempfile.TemporaryDirectory()
        self._config = parse_config(
            {
                "output": self._directory.name,
                "log_every": 1,
                "save_every": 1_000_000,
                "model": {"path": str(folder), "dtype": dtype},
                "data": {"train": "given as token ids"},
                "method": {"preset": preset},
                "optim": {"pairs_per_step": batch, "train_batch": batch, "learning_rate": 1e-5},
            },
            "benchmark",
        )
        self.detail: dict[str, Any] = {"dtype": dtype, "batch": batch, "preset": preset}
        self.computed: int | None = None

    def prepare(self, sample: Sample) -> MarginTrainer:
        """Returns a trainer for a sample."""
        # The texts have no strengths, and the time of a step does not depend on their values.
        strength = 0.8 if self._config.method.method().estimator in ("column", "strength") else None
        pairs = []
        for group in sample.groups:
            chosen, rejected = map(EncodedResponse, group.ids)  # without segment ids: TRL passes none
            pair = PreferencePair(str(group.prompt), group.responses[0], group.responses[1], strength=strength)
            pairs.append(EncodedPair(chosen, rejected, strength, pair))
        trainer = MarginTrainer(self._module, pairs, self._config, Path(self._directory.name), progress=False)
        tune_for_training(trainer, self._module)
        return trainer

    def run(self, work: MarginTrainer) -> list[float]:
        """Trains for one epoch and returns the loss of each step."""
        work.train()
        self.computed = round(sum(entry["tokens"] for entry in work.history))
        return [entry["loss"] for entry in work.history]


load = MarginrmTrainer
