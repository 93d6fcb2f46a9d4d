"""The training loop: transformers' Trainer over packed pairs, with the margin method as its loss and a log that shows it.

Being a Trainer, it brings accelerate, FSDP, DeepSpeed, resuming and the loggers along. Margins live only in
`compute_loss`: evaluation and serving never see one.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer

from marginrm.calibration import correctness
from marginrm.errors import ConfigError, NonFiniteRewardError
from marginrm.forward.module import RewardModule
from marginrm.tuning.tune import tune
from marginrm_training.config import TrainConfig
from marginrm_training.data.collate import PairBatch, PairCollator
from marginrm_training.data.splits import EncodedPair
from marginrm_training.method import losses
from marginrm_training.method.margins import (
    ESTIMATED,
    SMALLEST_REFERENCE_BATCH,
    MarginMethod,
    Reference,
    RunningMean,
    Targets,
    check_reference_batch,
    target_margins,
)
from marginrm_training.run.progress import PairProgress
from marginrm_training.run.step_log import StepLog
from marginrm_training.run.trainer_arguments import training_arguments

_log = logging.getLogger(__name__)
MARGIN_STATE = "margin_state.json"


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
        held_out: Pairs to evaluate on every `eval_every` steps.
        progress: Whether to draw a progress bar.

    Raises:
        ConfigError: The reference batch is too small for the method, no whole number of them makes a step, or there is
            nothing to evaluate on.
    """

    def __init__(
        self,
        module: RewardModule,
        pairs: Sequence[EncodedPair],
        config: TrainConfig,
        run_dir: Path,
        *,
        held_out: Sequence[EncodedPair] = (),
        progress: bool = True,
    ) -> None:
        self.method: MarginMethod = config.method.method()
        self.section = config.method
        self.running = RunningMean(self.method.ema if self.method.ema is not None else 0.9)
        self.steps = StepLog()
        self.held_out = held_out
        self.collator = PairCollator(module)
        if config.eval_every and not held_out:
            raise ConfigError(f"eval_every = {config.eval_every}, and there are no held-out pairs. Set it to 0.")
        arguments = training_arguments(config, len(pairs), run_dir)
        check_reference_batch(self.method, min(len(pairs), config.optim.train_batch * arguments.world_size))
        if config.model.gradient_checkpointing:
            module.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        super().__init__(
            model=module,
            args=arguments,
            train_dataset=PairDataset(pairs),
            eval_dataset=PairDataset(held_out),
            data_collator=self.collator,
        )
        with torch.autocast(arguments.device.type, torch.bfloat16, enabled=config.model.dtype == "bfloat16"):
            # The weights are on their device only now. DeepSpeed follows the calls of a layer's modules.
            tune(module, "training", whole_last_layer=self.is_deepspeed_enabled)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, so accumulation averages it
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if progress:
            self.add_callback(PairProgress())

    @property
    def history(self) -> list[dict[str, float]]:
        """The learning curve: one entry per log line, means over all ranks."""
        return self.steps.history

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the mean loss of one micro-step's pairs.

        Raises:
            NonFiniteRewardError: A reward is NaN or infinite; the message names step and rows.
        """
        batch: PairBatch = inputs["batch"].to(self.args.device)
        rewards = model(batch.row)
        chosen, rejected = rewards[0::2], rewards[1::2]
        d = chosen - rejected
        reference = self._reference(d)
        if not math.isfinite(reference.mean):
            self._stop_at(batch, rewards)
        targets = target_margins(self.method, d, reference, batch.given, self._warmup())
        each = preference_losses(self.method, d, targets, self.section.label_smoothing)
        if self.section.centring:
            each = each + self.section.centring * losses.centring(chosen, rejected)
        loss = each.mean()
        self._record(d, targets, reference, batch.row.tokens)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measures the held-out pairs, without any margin, and adds the figures to the learning curve.

        Every rank measures all of them: they are few, and so no rank waits for another's batch.

        Args:
            eval_dataset: Other encoded pairs to measure.
            ignore_keys: Trainer's; there is nothing to ignore.
            metric_key_prefix: What the figures' names begin with.
        """
        pairs: Sequence[EncodedPair] = self.held_out if eval_dataset is None else eval_dataset
        size = self.args.per_device_train_batch_size
        rewards = []
        self.model_wrapped.eval()
        with torch.no_grad():
            for start in range(0, len(pairs), size):
                batch = self.collator(pairs[start : start + size])["batch"].to(self.args.device)
                rewards.append(self.model_wrapped(batch.row).double())
        self.model_wrapped.train()
        flat = torch.cat(rewards)
        d = flat[0::2] - flat[1::2]
        metrics = {
            f"{metric_key_prefix}_bt_nll": float(losses.bradley_terry(d).mean()),
            f"{metric_key_prefix}_accuracy": float(correctness(d.cpu().numpy()).mean()),
        }
        self.steps.evaluated(self.state.global_step, metrics)
        super().log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the method's quantities, averaged over ranks and over the micro-steps since the last log."""
        if "loss" in logs and self.steps.micro_steps:
            self._average_over_ranks()
            logs = self.steps.line(self.state.global_step, logs)
            for warning in self.steps.warnings(logs, filtered=self.method.filter != "none"):
                _log.warning("Step %d: %s", self.state.global_step, warning)
        super().log(logs, start_time)

    def _reference(self, d: Tensor) -> Reference:
        """Measures the reference batch over all ranks: sums before the division, since last batches differ in size."""
        values = d.detach().double()
        count = torch.tensor(float(values.numel()), dtype=torch.float64, device=values.device)
        sums = self.accelerator.reduce(torch.stack([values.sum(), values.square().sum(), count]), reduction="sum")
        total, squares, pairs = sums.tolist()  # one wait for the device
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
        values = d.detach().float().cpu()
        self.steps.add(
            {
                "bt_nll": float(losses.bradley_terry(values).mean()),
                "accuracy": float(correctness(values.numpy()).mean()),
                "d_mean": float(values.mean()),
                "d_std": reference.std,
                "mu_B": reference.mean,
                "target_margin": targets.mean,
                "fire_rate": targets.fired,
                "tokens": float(tokens),
            }
        )

    def _average_over_ranks(self) -> None:
        """Turns this rank's sums into the mean over all ranks, the same on each."""
        if self.args.world_size > 1:
            names = list(self.steps.sums)
            sums = torch.tensor([self.steps.sums[name] for name in names], dtype=torch.float64, device=self.args.device)
            means = self.accelerator.reduce(sums, reduction="mean").tolist()
            self.steps.sums = dict(zip(names, means, strict=True))

    def _stop_at(self, batch: PairBatch, rewards: Tensor) -> None:
        finite = rewards.detach().isfinite()
        places = [place for place, good in zip(batch.places, finite[0::2] & finite[1::2], strict=True) if not good]
        where = f"the rewards of {', '.join(places[:4])} are" if places else "a reward on another rank is"
        raise NonFiniteRewardError(
            f"Step {self.state.global_step}: {where} not finite, so training stops here. Lower optim.learning_rate, or "
            "train in float32; the last saved steps are good."
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._average_over_ranks()
        if self.args.should_save:
            state = {"running": asdict(self.running), "steps": self.steps.state()}
            Path(output_dir, MARGIN_STATE).write_text(json.dumps(state), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint, MARGIN_STATE)
        if not path.is_file():
            raise ConfigError(
                f"{path} is missing, and with it the running mean of the margins. Start over with --no-resume; with "
                "several machines, give all of them one output folder."
            )
        state = json.loads(path.read_text(encoding="utf-8"))
        self.running = RunningMean(**state["running"])
        self.steps = StepLog.from_state(state["steps"])


def preference_losses(method: MarginMethod, d: Tensor, targets: Targets, smoothing: float) -> Tensor:
    """Returns the loss of each pair, [pairs], for any method."""
    if method.loss == "scaled_bt":
        return losses.scaled_bt(d, targets.margins)
    if method.loss == "soft_label":
        return losses.soft_label(d, targets.margins)
    if smoothing:
        return losses.smoothed(d, targets.margins, smoothing)
    return losses.margin_loss(d, targets.margins)
