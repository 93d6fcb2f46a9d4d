"""One training run from its configuration to its checkpoint, readable top to bottom."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from marginrm.encoding import Encoder
from marginrm.errors import DataError
from marginrm.forward.module import RewardModule
from marginrm.group_calibration import FEWEST_PROMPTS
from marginrm.loading import load_for_training
from marginrm.manifest import Manifest, MethodInfo
from marginrm.reward_model import RewardModel
from marginrm.tuning.tune import tune
from marginrm_training.checkpoint.export import RunRecord, export
from marginrm_training.config import TrainConfig, expand
from marginrm_training.data.splits import EncodedPair, load_splits
from marginrm_training.evaluation.groups import Groups, load_groups
from marginrm_training.evaluation.pairs import score_pairs
from marginrm_training.method.margins import MarginMethod, check_reference_batch
from marginrm_training.run.activations import save_activations
from marginrm_training.run.distributed import (
    check_sharding,
    gather_trained_module,
    leftover_pairs,
    print_once,
    ranks,
    shut_down_process_group,
)
from marginrm_training.run.dry_run import plan
from marginrm_training.run.lora import merge_lora, with_lora
from marginrm_training.run.resume import resume_checkpoint
from marginrm_training.run.trainer import MarginTrainer
from marginrm_training.run.trainer_arguments import check_loggers

_BEFORE = 500  # test pairs that are scored before training, for the report


def train(config: TrainConfig, *, resume: bool = True, dry_run: bool = False) -> Manifest | None:
    """Trains, calibrates, evaluates and writes a checkpoint.

    Under `accelerate launch` every process calls this; the first one prints and writes.

    Args:
        config: The run.
        resume: Resume from the last saved step, if there is one of this run.
        dry_run: Stop after reading and checking the data, and print the plan of the run.

    Returns:
        The checkpoint's manifest; None after a dry run, and on all processes but the first.

    Raises:
        MarginRMError: A setting, a file or the model is unusable; found before the first step where possible.
    """
    processes = ranks()  # first, since it joins the other processes
    check_loggers(config.loggers)
    output = Path(expand(config.output))
    steps = output / "trainer"
    method = config.method.method()
    check_reference_batch(method, config.optim.train_batch * processes)
    module, encoder = load(config)
    splits = load_splits(config.data, encoder, method, config.seed)
    bon = config.data.best_of_n
    groups = load_groups(expand(bon), config.data.max_bad_rows) if bon else None
    choices = held_out_groups(config, splits.train.pairs)
    for split in (splits.train, splits.calibration, splits.test):
        print_once(split.summary())
    if groups and groups.excluded.total:
        print_once(f"best_of_n: {len(groups.groups):,} groups; left out: {groups.excluded}")
    if choices:
        print_once(f"calibration_groups: {len(choices.groups):,} groups; left out: {choices.excluded}")
    if rest := leftover_pairs(len(splits.train.pairs), config.optim.train_batch):
        print_once(
            f"each epoch leaves out {rest:,} training pairs, drawn anew: they do not fill a forward pass on every rank"
        )
    trainer = MarginTrainer(module, splits.train.pairs, config, steps, held_out=splits.calibration.pairs)
    tune_for_training(trainer, module)
    print_once(f"forward path: {module.forward_reason}")
    check_sharding(sharded=trainer.is_fsdp_enabled)
    if dry_run:
        print_once(plan(config, splits, module))
        shut_down_process_group(trainer)
        return None
    before = score_pairs(RewardModel.from_module(module, encoder), splits.test.pairs[:_BEFORE]).d
    trainer.train(resume_from_checkpoint=resume_checkpoint(config, steps, resume=resume))
    module = gather_trained_module(trainer, module, lambda: load(config)[0])
    shut_down_process_group(trainer)
    if not trainer.is_world_process_zero():
        return None
    merge_lora(module)
    record = RunRecord(
        name=output.name,
        base_model=config.model.path,
        method=method_info(config, method, trainer),
        files=splits.files,
        training=config.model_dump(mode="json"),
        truncation=config.data.too_long,
        history=trainer.history,
        before=before,
        groups=groups,
        style_control=config.method.style_control,
        choices=choices,
        uncertainty=config.calibration.uncertainty,
    )
    manifest = export(output, module, encoder, splits, record)
    if (steps / "runs").is_dir():  # TensorBoard's event files, which stay when the steps to resume from are removed
        shutil.copytree(steps / "runs", output / "runs", dirs_exist_ok=True)
    shutil.rmtree(steps, ignore_errors=True)
    return manifest


def load(config: TrainConfig) -> tuple[RewardModule, Encoder]:
    """Loads the module and encoder that the run starts from, with LoRA matrices if it trains those; deterministic."""
    module, encoder = load_for_training(
        expand(config.model.path),
        seed=config.seed,
        max_length=config.model.max_length,
        positions=config.model.positions,
        head_std=config.model.head_std,
        trust_remote_code=config.model.trust_remote_code,
    )
    if config.model.lora:
        module = with_lora(module, config.model.lora, encoder.max_length)
    return module, encoder


def held_out_groups(config: TrainConfig, pairs: Sequence[EncodedPair]) -> Groups | None:
    """Returns the candidate groups to calibrate on, without the prompts of the training pairs; None without a file.

    Raises:
        DataError: The file is unusable, or no prompt of it is held out.
    """
    place = config.data.calibration_groups
    if place is None:
        return None
    kept = load_groups(expand(place), config.data.max_bad_rows).without_prompts_of(pairs)
    if len(kept.groups) < FEWEST_PROMPTS:
        raise DataError(
            f"{place}: {len(kept.groups)} groups are left to calibrate on, of prompts that no training pair has; "
            f"{FEWEST_PROMPTS} are needed ({kept.excluded}). Raise data.calibration_share, or give groups of other prompts."
        )
    return kept


def tune_for_training(trainer: MarginTrainer, module: RewardModule) -> None:
    """Tunes the module on the device and in the dtype of the trainer, which has moved its weights there."""
    chosen = trainer.config.model.gradient_checkpointing
    recompute = chosen == "mlp" or (chosen == "auto" and trainer.args.device.type == "cpu")
    with torch.autocast(trainer.args.device.type, torch.bfloat16, enabled=trainer.args.bf16):
        tune(module, "training", whole_last_layer=trainer.is_deepspeed_enabled)  # DeepSpeed follows a layer's calls
        save_activations(module, recompute_mlps=recompute)


def method_info(config: TrainConfig, method: MarginMethod, trainer: MarginTrainer) -> MethodInfo:
    """Returns the method for the manifest: settings, means of target margins and fire rate, and weights of style."""
    history = trainer.history
    options = asdict(method) | {
        "label_smoothing": config.method.label_smoothing,
        "centring": config.method.centring,
        "warmup_ratio": config.method.warmup_ratio,
        "style": trainer.style.describe() if trainer.style else None,
    }
    return MethodInfo(
        preset=config.method.preset,
        loss=method.loss,
        estimator=method.estimator,
        filter=method.filter,
        scale=method.scale,
        cap=method.cap,
        options=options,
        fire_rate=_mean("fire_rate", history),
        mean_target_margin=_mean("target_margin", history),
    )


def _mean(name: str, history: list[dict[str, float]]) -> float | None:
    values = [entry[name] for entry in history if name in entry]  # entries of evaluations lack it
    return float(np.mean(values)) if values else None
