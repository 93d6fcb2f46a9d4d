"""One training run from its configuration to its checkpoint, readable top to bottom."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate.state import PartialState
from pydantic import ValidationError

from marginrm.encoding import Encoder
from marginrm.errors import ConfigError
from marginrm.forward.module import RewardModule
from marginrm.loading import load_for_training
from marginrm.manifest import Manifest, MethodInfo
from marginrm.reward_model import RewardModel
from marginrm_training.checkpoint.export import RunRecord, export
from marginrm_training.config import TrainConfig, expand
from marginrm_training.data.splits import load_splits
from marginrm_training.evaluation.groups import load_groups
from marginrm_training.evaluation.pairs import score_pairs
from marginrm_training.method.margins import MarginMethod, check_reference_batch
from marginrm_training.run.dry_run import plan
from marginrm_training.run.lora import merge_lora, with_lora
from marginrm_training.run.trainer import MARGIN_STATE, MarginTrainer
from marginrm_training.run.trainer_arguments import check_loggers, check_sharding, left_over, ranks

_log = logging.getLogger(__name__)
_BEFORE = 500  # test pairs that are scored before training, for the report


def train(config: TrainConfig, *, resume: bool = True, dry_run: bool = False) -> Manifest | None:
    """Trains, calibrates, evaluates and writes a checkpoint.

    Under `accelerate launch` every process calls this; the first one prints and writes.

    Args:
        config: The run.
        resume: Whether to go on from the last saved step, if there is one of this very run.
        dry_run: Stop after reading and checking the data, and say what would be done.

    Returns:
        The checkpoint's manifest; None after a dry run, and on all processes but the first.

    Raises:
        MarginRMError: A setting, a file or the model is unusable; found before the first step where possible.
    """
    processes = ranks()  # first of all: joins the others, if there are any
    check_loggers(config.loggers)
    output = Path(expand(config.output))
    method = config.method.method()
    check_reference_batch(method, config.optim.train_batch * processes)
    module, encoder = load(config)
    splits = load_splits(config.data, encoder, method, config.seed)
    groups = load_groups(expand(config.data.best_of_n)) if config.data.best_of_n else []
    for split in (splits.train, splits.calibration, splits.test):
        say(split.summary())
    if rest := left_over(config, len(splits.train.pairs)):
        say(f"each epoch leaves out {rest:,} training pairs, drawn anew: they do not fill a forward pass on every rank")
    held_out = splits.calibration.pairs
    trainer = MarginTrainer(module, splits.train.pairs, config, output / "trainer", held_out=held_out)
    say(f"forward path: {module.forward_reason}")
    check_sharding(sharded=trainer.is_fsdp_enabled)
    if dry_run:
        say(plan(config, splits, module))
        leave_ranks(trainer)
        return None
    before = score_pairs(RewardModel.from_module(module, encoder), splits.test.pairs[:_BEFORE]).d
    trainer.train(resume_from_checkpoint=last_step(config, output / "trainer", resume=resume))
    module = trained(trainer, module, config)
    leave_ranks(trainer)
    if not trainer.is_world_process_zero():
        return None
    record = RunRecord(
        name=output.name,
        base_model=config.model.path,
        method=method_info(config, method, trainer.history),
        files=splits.files,
        training=config.model_dump(mode="json"),
        truncation=config.data.too_long,
        history=trainer.history,
        before=before,
        groups=groups,
    )
    manifest = export(output, module, encoder, splits, record)
    if (output / "trainer" / "runs").is_dir():  # TensorBoard's event files, which outlive the steps to resume from
        shutil.copytree(output / "trainer" / "runs", output / "runs", dirs_exist_ok=True)
    shutil.rmtree(output / "trainer", ignore_errors=True)
    return manifest


def load(config: TrainConfig) -> tuple[RewardModule, Encoder]:
    """Loads what the run starts from, with LoRA matrices if it trains those; the same on every call."""
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


def trained(trainer: MarginTrainer, module: RewardModule, config: TrainConfig) -> RewardModule:
    """Returns the trained module whole: gathered from all ranks where they hold parts, and with LoRA merged in."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every rank takes part
        if not trainer.is_world_process_zero():
            return module
        module, _ = load(config)
        module.load_state_dict(weights)
    merge_lora(module)
    return module


def leave_ranks(trainer: MarginTrainer) -> None:
    """Ends what joins this process to the others, in order: the wrapped model first, then all at once the group.

    Left to the interpreter's exit, the group's threads sometimes abort the process; and a wrapped model that outlives its
    group sometimes waits for ever.
    """
    trainer.model_wrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    trainer.accelerator.free_memory()  # collects garbage too
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def say(line: str) -> None:
    """Prints a line for people, once however many processes train."""
    if PartialState().is_main_process:
        print(line)  # noqa: T201 - what a command tells its user


def last_step(config: TrainConfig, run_dir: Path, *, resume: bool) -> str | None:
    """Returns the folder to resume from, and notes whose run this is; without `resume` it clears the steps saved before.

    Raises:
        ConfigError: The saved steps belong to another configuration.
    """
    note = run_dir / "run.json"
    if resume and note.is_file() and _noted(note) != config:
        raise ConfigError(
            f"{run_dir} holds the steps of a run with other settings. Go on with those, choose another output, or "
            "start over with --no-resume."
        )
    PartialState().wait_for_everyone()  # nobody writes the note before all have read it
    if PartialState().is_main_process:
        if not resume:
            shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        fresh = note.with_suffix(".new")
        fresh.write_text(config.model_dump_json(), encoding="utf-8")
        fresh.replace(note)  # whole or not at all, whenever the run is killed
    PartialState().wait_for_everyone()
    for step in sorted(run_dir.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if _whole(step):
            say(f"resuming from {step}")
            return str(step)
        say(f"passed over {step}: it was being saved when the run ended")
    return None


def _noted(note: Path) -> TrainConfig | None:
    """Returns whose run it is; settings that did not exist when it began have their defaults."""
    try:
        return TrainConfig.model_validate_json(note.read_text(encoding="utf-8"))
    except ValidationError:
        return None


def _whole(step: Path) -> bool:
    """Whether a step was saved to the end: the trainer writes its state last."""
    try:
        json.loads((step / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (step / MARGIN_STATE).is_file()


def method_info(config: TrainConfig, method: MarginMethod, history: list[dict[str, float]]) -> MethodInfo:
    """Returns what the manifest says of the method: what it was, and what it did."""
    options = asdict(method) | {
        "label_smoothing": config.method.label_smoothing,
        "centring": config.method.centring,
        "warmup_ratio": config.method.warmup_ratio,
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
    values = [entry[name] for entry in history if name in entry]  # lines of an evaluation alone have none
    return float(np.mean(values)) if values else None
