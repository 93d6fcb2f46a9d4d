"""The training loop: transformers' Trainer over packed pairs, with the margin method as its loss.

Trainer brings accelerate, FSDP, DeepSpeed, resuming and the loggers. Target margins exist only in `compute_loss`:
evaluation and serving never use one.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from marginrm.atomic_file import replace_file
from marginrm.calibration import correctness
from marginrm.errors import ConfigError, NonFiniteRewardError
from marginrm.forward.module import RewardModule
from marginrm_training.config import TrainConfig
from marginrm_training.data.collate import PairBatch, PairCollator
from marginrm_training.data.splits import EncodedPair
from marginrm_training.method import losses
from marginrm_training.method.margins import (
    ESTIMATED,
    POOLED,
    SMALLEST_REFERENCE_BATCH,
    MarginMethod,
    Reference,
    RunningMean,
    Targets,
    check_reference_batch,
    target_margins,
)
from marginrm_training.method.style import StyleTerm, newton_sums, split_sums
from marginrm_training.run.layer_decay import layer_rates, with_layer_rates
from marginrm_training.run.progress import PairProgress
from marginrm_training.run.resume import MARGIN_STATE
from marginrm_training.run.step_log import StepLog
from marginrm_training.run.trainer_arguments import training_arguments

_log = logging.getLogger(__name__)


class PairDataset(Dataset[EncodedPair]):
    """Encoded pairs as a PyTorch data set."""

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
        module: The module; it is trained in place, and moved to the device of the run.
        pairs: The training pairs.
        config: The run.
        run_dir: Folder of the steps to resume from.
        held_out: Pairs to evaluate on every `eval_every` steps.
        progress: Whether to draw a progress bar.

    Raises:
        ConfigError: The reference batch is too small for the method, a step is not a multiple of it, or there are no
            pairs to evaluate on.
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
        self.method_config = config.method
        self.config = config
        self._module = module
        self.running_mean = RunningMean(self.method.ema if self.method.ema is not None else 0.9)
        self.style = _style_term(pairs) if config.method.style_control else None
        self.step_log = StepLog()
        self.held_out = held_out
        self.collator = PairCollator(module, style=self.style is not None)
        if config.eval_every and not held_out:
            raise ConfigError(f"eval_every = {config.eval_every}, and there are no held-out pairs. Set it to 0.")
        arguments = training_arguments(config, len(pairs), run_dir)
        check_reference_batch(self.method, min(len(pairs), config.optim.train_batch * arguments.world_size))
        if config.model.gradient_checkpointing is True:
            module.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        super().__init__(
            model=module,
            args=arguments,
            train_dataset=PairDataset(pairs),
            eval_dataset=PairDataset(held_out),
            data_collator=self.collator,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean, so accumulation averages it
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_MarginStateSaver(self))
        if progress:
            self.add_callback(PairProgress())

    @property
    def history(self) -> list[dict[str, float]]:
        """The learning curve: one entry per log line, means over all ranks."""
        return self.step_log.history

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, from a saved step if its folder is given.

        Args:
            resume_from_checkpoint: The saved step, as `resume_checkpoint` returns it.
            *args: Trainer's.
            **kwargs: Trainer's.

        Raises:
            ConfigError: The step lacks the state of the margin method.
        """
        if resume_from_checkpoint:
            self.load_margin_state(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns Trainer's optimiser, with `optim.layer_decay` in its learning rates.

        Args:
            model: Trainer's.

        Raises:
            ConfigError: The model's layers are not known, or its weights are sharded.
        """
        new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if new and self.config.optim.layer_decay != 1:
            rates = layer_rates(self._module, self.config.optim.layer_decay)
            optimizer.param_groups = with_layer_rates(optimizer.param_groups, rates)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the mean loss of one micro-step's pairs: forward, target margins, losses.

        Raises:
            NonFiniteRewardError: A reward is NaN or infinite; the message names step and rows.
        """
        batch: PairBatch = inputs["batch"].to(self.args.device)
        rewards = model(batch.row)
        chosen, rejected = rewards[0::2], rewards[1::2]
        d = chosen - rejected
        margin = d if self.style is None else d + self.style.logits(self.style.standardised(_present(batch.style)))
        reference = self._reference(margin, chosen)
        if not math.isfinite(reference.mean):
            self._stop_at(batch, rewards)
        targets = target_margins(self.method, margin, reference, batch.labels, self._warmup(), chosen)
        each = losses.preference_losses(self.method, margin, targets, self.method_config.label_smoothing)
        if self.style is not None:
            self._learn_style(self.style, margin, targets, _present(batch.style))
        if self.method_config.centring:
            each = each + self.method_config.centring * losses.centring(chosen, rejected)
        loss = each.mean()
        self._record(d, targets, reference, batch.row.tokens)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measures the held-out pairs, without any target margin, and adds the figures to the learning curve.

        Every rank measures all of them, since they are few: no rank waits for another's batch.

        Args:
            eval_dataset: Other encoded pairs to measure.
            ignore_keys: Trainer's; unused.
            metric_key_prefix: Prefix of the figures' names.
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
        self.step_log.evaluated(self.state.global_step, metrics)
        super().log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the method's quantities, averaged over ranks and over the micro-steps since the last log."""
        if "loss" in logs and self.step_log.micro_steps:
            self._average_over_ranks()
            logs = self.step_log.line(self.state.global_step, logs)
            filtered, unbounded = self.method.filter != "none", self.method.unbounded
            for warning in self.step_log.warnings(logs, filtered=filtered, unbounded=unbounded):
                _log.warning("Step %d: %s", self.state.global_step, warning)
        super().log(logs, start_time)

    def save_margin_state(self, step: Path) -> None:
        """Writes running mean and step log to a saved step, averaged over ranks; every rank must call this."""
        self._average_over_ranks()
        if self.args.should_save:
            state = {"running": asdict(self.running_mean), "steps": self.step_log.state()}
            if self.style is not None:
                state["style"] = self.style.state()
            replace_file(step / MARGIN_STATE, json.dumps(state))

    def load_margin_state(self, step: Path) -> None:
        """Takes running mean and step log from a saved step.

        Raises:
            ConfigError: The step has none.
        """
        path = step / MARGIN_STATE
        if not path.is_file():
            raise ConfigError(
                f"{path} is missing, and with it the running mean of the margins. Start over with --no-resume; with "
                "several machines, give all of them one output folder."
            )
        state = json.loads(path.read_text(encoding="utf-8"))
        self.running_mean = RunningMean(**state["running"])
        self.step_log = StepLog.from_state(state["steps"])
        if self.style is not None:
            self.style = StyleTerm.from_state(state["style"])

    def _reference(self, d: Tensor, chosen: Tensor) -> Reference:
        """Returns mean and deviation over all ranks' pairs; by sums, since the ranks' batches may differ in size.

        Estimators in `POOLED` also get all ranks' rewards; the rejected one is chosen - d, with style where that is on.
        """
        values = d.detach().double()
        count = torch.tensor(float(values.numel()), dtype=torch.float64, device=values.device)
        sums = self.accelerator.reduce(torch.stack([values.sum(), values.square().sum(), count]), reduction="sum")
        total, squares, pairs = sums.tolist()  # one synchronisation with the device
        mean = total / pairs
        reference = Reference(mean, max(squares / pairs - mean**2, 0.0) ** 0.5, int(pairs))
        if self.method.estimator in POOLED:
            own = torch.stack([chosen.detach(), (chosen - d).detach()], dim=1).float()
            return replace(reference, pool=self.accelerator.gather(own).T)
        small = reference.pairs < SMALLEST_REFERENCE_BATCH and self.method.ema is not None
        if self.method.estimator == "ema_mean" or (small and self.method.estimator in ESTIMATED):
            return Reference(self.running_mean.update(mean), reference.std, reference.pairs)
        return reference

    def _learn_style(self, style: StyleTerm, margin: Tensor, targets: Targets, differences: Tensor) -> None:
        """Moves b by one Newton step on this micro-step's loss, over all ranks' pairs; the same on every rank."""
        at = margin.detach().requires_grad_()
        each = losses.preference_losses(self.method, at, targets, self.method_config.label_smoothing)
        (slopes,) = torch.autograd.grad(each.sum(), at)
        sums = newton_sums(at, slopes, style.standardised(differences))
        style.update(*split_sums(self.accelerator.reduce(sums, reduction="sum").tolist()))

    def _warmup(self) -> float:
        steps = self.method_config.warmup_ratio * max(self.state.max_steps, 1)
        return min(1.0, self.state.global_step / steps) if steps else 1.0

    def _record(self, d: Tensor, targets: Targets, reference: Reference, tokens: int) -> None:
        values = d.detach().float().cpu()
        self.step_log.add(
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
            | ({f"style_{name}": value for name, value in self.style.by_name().items()} if self.style else {})
        )

    def _average_over_ranks(self) -> None:
        """Turns this rank's sums into the mean over all ranks, the same on each."""
        if self.args.world_size > 1:
            names = list(self.step_log.sums)
            sums = torch.tensor(
                [self.step_log.sums[name] for name in names], dtype=torch.float64, device=self.args.device
            )
            means = self.accelerator.reduce(sums, reduction="mean").tolist()
            self.step_log.sums = dict(zip(names, means, strict=True))

    def _stop_at(self, batch: PairBatch, rewards: Tensor) -> None:
        finite = rewards.detach().isfinite()
        sources = [source for source, good in zip(batch.sources, finite[0::2] & finite[1::2], strict=True) if not good]
        where = f"the rewards of {', '.join(sources[:4])} are" if sources else "a reward on another rank is"
        raise NonFiniteRewardError(
            f"Step {self.state.global_step}: {where} not finite, so training stops. Lower optim.learning_rate, or train "
            "in float32; the last saved steps can be resumed from."
        )


def _style_term(pairs: Sequence[EncodedPair]) -> StyleTerm:
    return StyleTerm.of((pair.pair.chosen, pair.pair.rejected) for pair in pairs)


def _present(style: Tensor | None) -> Tensor:
    assert style is not None  # the collator of a run with style control adds it
    return style


class _MarginStateSaver(TrainerCallback):
    """Adds the state of the margin method to each step that Trainer has saved."""

    def __init__(self, trainer: MarginTrainer) -> None:
        self._trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Saves it beside the weights; every rank comes here."""
        self._trainer.save_margin_state(Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))
