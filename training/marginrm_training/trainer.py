"""The training loop: transformers' Trainer over packed pairs, with the margin method as its loss and a log that shows it.

Being a Trainer, it brings accelerate, FSDP, DeepSpeed, resuming and the loggers along. Margins live only in
`compute_loss`: evaluation and serving never see one.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from marginrm.reward_module import RewardModule
from marginrm_training import losses
from marginrm_training.collate import PairBatch, PairCollator
from marginrm_training.config import TrainConfig
from marginrm_training.data import EncodedPair
from marginrm_training.margins import (
    ESTIMATED,
    SMALLEST_REFERENCE_BATCH,
    MarginMethod,
    Reference,
    RunningMean,
    Targets,
    check_reference_batch,
    target_margins,
)

_log = logging.getLogger(__name__)
_MARGIN_STATE = "margin_state.json"


class PairDataset(Dataset[EncodedPair]):
    """Encoded pairs as a data set."""

    def __init__(self, pairs: Sequence[EncodedPair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> EncodedPair:
        """Returns one pair."""
        return self.pairs[index]


class MarginTrainer(Trainer):
    """Trains a `RewardModule` on encoded pairs.

    Args:
        module: The module; it is trained in place.
        pairs: The training pairs.
        config: The run.
        run_dir: Where checkpoints to resume from are written.
        progress: Whether to draw a progress bar.

    Raises:
        ConfigError: The reference batch is too small for the method.
    """

    def __init__(
        self,
        module: RewardModule,
        pairs: Sequence[EncodedPair],
        config: TrainConfig,
        run_dir: Path,
        *,
        progress: bool = True,
    ) -> None:
        self.method: MarginMethod = config.method.method()
        self.section = config.method
        self.running = RunningMean(self.method.ema if self.method.ema is not None else 0.9)
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, float] = defaultdict(float)
        self._micro_steps = 0
        arguments = training_arguments(config, len(pairs), run_dir)
        check_reference_batch(self.method, min(len(pairs), config.optim.train_batch * arguments.world_size))
        super().__init__(
            model=module, args=arguments, train_dataset=PairDataset(pairs), data_collator=PairCollator(module)
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean, so accumulation averages it
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if progress:
            self.add_callback(PairProgress())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the mean loss of one micro-step's pairs."""
        batch: PairBatch = inputs["batch"].to(self.args.device)
        rewards = model(batch.row)
        chosen, rejected = rewards[0::2], rewards[1::2]
        d = chosen - rejected
        reference = self._reference(d)
        targets = target_margins(self.method, d, reference, batch.given, self._warmup())
        each = preference_losses(self.method, d, targets, self.section.label_smoothing)
        if self.section.centring:
            each = each + self.section.centring * losses.centring(chosen, rejected)
        loss = each.mean()
        self._record(d, targets, reference, batch.row.tokens)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the method's quantities, averaged over the micro-steps since the last log."""
        if "loss" in logs and self._micro_steps:
            logs |= {name: total / self._micro_steps for name, total in self._sums.items()}
            self._sums.clear()
            self._micro_steps = 0
            self.history.append({"step": float(self.state.global_step), **logs})
            self._warn_of_silent_filter(logs)
        super().log(logs, start_time)

    def _reference(self, d: Tensor) -> Reference:
        """Measures the reference batch over all ranks: sums before the division, since last batches differ in size."""
        values = d.detach().double()
        count = torch.tensor(float(values.numel()), dtype=torch.float64, device=values.device)
        sums = self.accelerator.reduce(torch.stack([values.sum(), values.square().sum(), count]), reduction="sum")
        total, squares, pairs = (float(value) for value in sums)
        mean = total / pairs
        reference = Reference(mean, max(squares / pairs - mean**2, 0.0) ** 0.5, int(pairs))
        small = reference.pairs < SMALLEST_REFERENCE_BATCH and self.method.ema is not None
        if self.method.estimator == "ema_mean" or (small and self.method.estimator in ESTIMATED):
            return Reference(self.running.update(mean), reference.std, reference.pairs)
        return reference

    def _warmup(self) -> float:
        steps = self.section.warmup_ratio * max(self.state.max_steps, 1)
        return min(1.0, self.state.global_step / steps) if steps else 1.0

    def _record(self, d: Tensor, targets: Targets, reference: Reference, tokens: int) -> None:
        values = d.detach().float()
        step = {
            "bt_nll": float(losses.bradley_terry(values).mean()),
            "accuracy": float((values > 0).float().mean() + (values == 0).float().mean() / 2),
            "d_mean": float(values.mean()),
            "d_std": float(values.std(correction=0)),
            "mu_B": reference.mean,
            "target_margin": targets.mean,
            "fire_rate": targets.fired,
            "tokens": float(tokens),
        }
        for name, value in step.items():
            self._sums[name] += value
        self._micro_steps += 1

    def _warn_of_silent_filter(self, logs: dict[str, float]) -> None:
        if self.method.filter != "none" and logs["fire_rate"] == 0.0:
            _log.warning(
                "Step %d: the filter let no pair through since the last log, so this is plain Bradley-Terry.",
                self.state.global_step,
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {"running": asdict(self.running), "history": self.history}
        if self.args.should_save:
            Path(output_dir, _MARGIN_STATE).write_text(json.dumps(state), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint, _MARGIN_STATE) if checkpoint else None
        if path and path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            self.running = RunningMean(**state["running"])
            self.history = state["history"]


class PairProgress(TrainerCallback):
    """A progress bar over optimiser steps that shows the quantities people watch."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Draws the bar, at the step that a resumed run stands at."""
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Shows the last log's quantities beside the bar."""
        if self._bar is not None and logs and "bt_nll" in logs:
            self._bar.set_postfix_str(
                f"loss {logs['loss']:.3f} accuracy {logs['accuracy']:.2f} "
                f"mu {logs['mu_B']:.2f} fired {logs['fire_rate']:.2f}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()


def preference_losses(method: MarginMethod, d: Tensor, targets: Targets, smoothing: float) -> Tensor:
    """Returns the loss of each pair, [pairs], for any method."""
    if method.loss == "scaled_bt":
        return losses.scaled_bt(d, targets.margins)
    if method.loss == "soft_label":
        return losses.soft_label(d, targets.margins)
    if smoothing:
        return losses.smoothed(d, targets.margins, smoothing)
    return losses.margin_loss(d, targets.margins)


def training_arguments(config: TrainConfig, pairs: int, run_dir: Path) -> TrainingArguments:
    """Translates a run into transformers' arguments."""
    optim = config.optim
    estimated = config.method.method().estimator in ESTIMATED
    last = pairs % optim.train_batch
    return TrainingArguments(
        output_dir=str(run_dir),
        seed=config.seed,
        data_seed=config.seed,
        num_train_epochs=optim.epochs,
        learning_rate=optim.learning_rate,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.clip,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": optim.min_lr_ratio},
        warmup_steps=optim.warmup_ratio if optim.warmup_ratio < 1 else 0,
        per_device_train_batch_size=optim.train_batch,
        gradient_accumulation_steps=max(1, optim.pairs_per_step // optim.train_batch),
        # A last batch too small for its mean to say anything is left out; with an EMA it can stay.
        dataloader_drop_last=estimated and 0 < last < SMALLEST_REFERENCE_BATCH and config.method.ema is None,
        activation_checkpointing=config.model.gradient_checkpointing,
        bf16=config.model.dtype == "bfloat16",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        save_total_limit=2,
        report_to=list(config.loggers) or "none",
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
