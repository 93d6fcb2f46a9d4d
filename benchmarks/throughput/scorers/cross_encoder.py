"""sentence-transformers' `CrossEncoder.predict`, which sorts by length and pads batches of 32."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder

from benchmarks.harness.groups import Group


class SentenceTransformers:
    """`CrossEncoder.predict` on pairs of texts, with its own batch size and raw scores."""

    def __init__(self, folder: Path, *, dtype: str) -> None:
        self._model = CrossEncoder(str(folder), model_kwargs={"dtype": dtype}, device="cpu")
        self.detail: dict[str, Any] = {"dtype": dtype, "version": version("sentence-transformers")}
        self.computed: int | None = None

    def prepare(self, groups: Sequence[Group]) -> list[tuple[str, str]]:
        """Returns (prompt, response) pairs."""
        return [(group.prompt, response) for group in groups for response in group.responses]

    def score(self, work: list[tuple[str, str]]) -> list[float]:
        """Predicts raw scores."""
        scores = self._model.predict(work, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        return [float(score) for score in scores]


load = SentenceTransformers
