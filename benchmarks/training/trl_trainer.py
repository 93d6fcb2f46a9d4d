"""TRL's `RewardTrainer` on pairs of token ids, with marginrm's optimiser settings."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets.arrow_dataset import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import RewardConfig, RewardTrainer

from benchmarks.harness.texts import Sample


class TrlTrainer:
    """`RewardTrainer`; each sample is one training run, and the next continues with its weights.

    Args:
        folder: The model.
        dtype: Dtype of matrix products.
        batch: Pairs per forward pass and per step.
        settings: Settings of `RewardConfig` that replace those of the speed benchmark.
    """

    def __init__(self, folder: Path, *, dtype: str, batch: int, settings: Mapping[str, Any] | None = None) -> None:
        changes = dict(settings or {})
        set_seed(changes.get("seed", 0))  # sets the random head, if the folder has none
        self._model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._directory = tempfile.TemporaryDirectory()
        fields: dict[str, Any] = {
            "output_dir": self._directory.name,
            "per_device_train_batch_size": batch,
            "num_train_epochs": 1,
            "learning_rate": 1e-5,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": 0.03,
            "adam_beta2": 0.95,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "seed": 0,
            "data_seed": 0,
            "bf16": dtype == "bfloat16",
            "gradient_checkpointing": False,
            "max_length": None,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        self._arguments = RewardConfig(**fields | changes)
        self.detail: dict[str, Any] = {"dtype": dtype, "batch": batch, "version": version("trl"), "settings": changes}
        self.computed: int | None = None

    def prepare(self, sample: Sample) -> RewardTrainer:
        """Returns a trainer for a sample; TRL leaves rows with token ids unchanged."""
        rows = [{"chosen_ids": list(group.ids[0]), "rejected_ids": list(group.ids[1])} for group in sample.groups]
        return RewardTrainer(
            model=self._model,
            args=self._arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=self._tokenizer,
        )

    def run(self, work: RewardTrainer) -> list[float]:
        """Trains for one epoch and returns the loss of each step."""
        work.train()
        return [entry["loss"] for entry in work.state.log_history if "loss" in entry]

    def save(self) -> str:
        """Writes model and tokenizer and returns their folder, which is deleted when this process ends."""
        folder = Path(self._directory.name, "saved")
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        return str(folder)


load = TrlTrainer
