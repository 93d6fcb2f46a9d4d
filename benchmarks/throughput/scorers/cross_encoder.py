"""sentence-transformers' `CrossEncoder.predict`, which sorts by length and pads batches of 32."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder

from benchmarks.harness.texts import Sample


class SentenceTransformers:
    """`CrossEncoder.predict` on pairs of texts, with its own batch size and raw scores."""

    def __init__(self, folder: Path, *, dtype: str) -> None:
        self._model = CrossEncoder(str(folder), model_kwargs={"dtype": dtype}, device="cpu")
        self.detail: dict[str, Any] = {"dtype": dtype, "version": version("sentence-transformers")}
        self.computed: int | None = None

    def prepare(self, sample: Sample) -> list[tuple[str, str]]:
        """Returns (prompt, response) pairs."""
        return [(str(group.prompt), response) for group in sample.groups for response in group.responses]

    def run(self, work: list[tuple[str, str]]) -> list[float]:
        """Predicts raw scores."""
        scores = self._model.predict(work, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        return [float(score) for score in scores]


load = SentenceTransformers
