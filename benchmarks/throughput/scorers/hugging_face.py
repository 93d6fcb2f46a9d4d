"""transformers' own forward pass on padded batches of token ids, one or more sequences in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.harness.texts import Sample


class _Sequence(NamedTuple):
    ids: tuple[int, ...]
    type_ids: tuple[int, ...] | None


class HuggingFace:
    """Padded batches through `AutoModelForSequenceClassification`.

    Args:
        folder: The model.
        dtype: Dtype of the whole model.
        batch: Responses in a batch; 1 is a plain loop.
        order: `arrival`, or `length` to batch sequences of similar length.
        device: `cpu` or `cuda`.
    """

    def __init__(
        self, folder: Path, *, dtype: str, batch: int, order: Literal["arrival", "length"], device: str = "cpu"
    ) -> None:
        self._model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model.to(device).eval()
        self._batch, self._by_length, self._device = batch, order == "length", device
        self.detail: dict[str, Any] = {"dtype": dtype, "batch": batch, "order": order}
        self.computed: int | None = None

    def prepare(self, sample: Sample) -> list[_Sequence]:
        """Returns the token ids of all responses."""
        return [_Sequence(*both) for group in sample.groups for both in zip(group.ids, group.type_ids, strict=True)]

    @torch.inference_mode()
    def run(self, work: list[_Sequence]) -> list[float]:
        """Scores one batch after another."""
        order = list(range(len(work)))
        if self._by_length:
            order.sort(key=lambda index: len(work[index].ids))
        rewards = [0.0] * len(work)
        self.computed = 0
        for start in range(0, len(order), self._batch):
            indices = order[start : start + self._batch]
            inputs = self._padded([work[index] for index in indices])
            self.computed += inputs["input_ids"].numel()
            logits = self._model(**inputs).logits[:, 0].float().tolist()
            for index, reward in zip(indices, logits, strict=True):
                rewards[index] = reward
        return rewards

    def _padded(self, batch: list[_Sequence]) -> dict[str, torch.Tensor]:
        longest = max(len(sequence.ids) for sequence in batch)
        ids = torch.full((len(batch), longest), self._model.config.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        types = torch.zeros_like(ids)
        for row, sequence in enumerate(batch):
            length = len(sequence.ids)
            ids[row, :length] = torch.tensor(sequence.ids)
            mask[row, :length] = 1
            if sequence.type_ids is not None:
                types[row, :length] = torch.tensor(sequence.type_ids)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if batch[0].type_ids is not None:
            inputs["token_type_ids"] = types
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}


load = HuggingFace
