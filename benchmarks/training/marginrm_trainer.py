"""marginrm's own training loop on pairs of token ids: packed rows, prompts shared between chosen and rejected."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.groups import Group
from marginrm.allocator import keep_memory
from marginrm.encoding import EncodedResponse
from marginrm.loading import load_for_training
from marginrm.preferences import PreferencePair
from marginrm_training.config import parse_config
from marginrm_training.data.splits import EncodedPair
from marginrm_training.run.train import tune_for_training
from marginrm_training.run.trainer import MarginTrainer


class MarginrmTrainer:
    """`MarginTrainer`; a portion is trained on in one run, and the next goes on with the weights.

    Args:
        folder: The model.
        dtype: Of matrix products.
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

    def prepare(self, groups: Sequence[Group]) -> MarginTrainer:
        """Returns a trainer for a portion."""
        pairs = []
        for group in groups:
            chosen, rejected = map(EncodedResponse, group.ids)  # without segment ids: TRL passes none
            # The texts have no strengths, and how long a step takes does not depend on them.
            given = 0.8 if self._config.method.method().estimator in ("column", "strength") else None
            pair = PreferencePair(group.prompt, group.responses[0], group.responses[1], strength=given)
            pairs.append(EncodedPair(chosen, rejected, given, pair))
        trainer = MarginTrainer(self._module, pairs, self._config, Path(self._directory.name), progress=False)
        tune_for_training(trainer, self._module)
        return trainer

    def score(self, work: MarginTrainer) -> list[float]:
        """Trains for an epoch and returns the loss of every step."""
        work.train()
        self.computed = round(sum(entry["tokens"] for entry in work.history))
        return [entry["loss"] for entry in work.history]


load = MarginrmTrainer
