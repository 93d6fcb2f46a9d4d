"""One training run from its configuration to its checkpoint, readable top to bottom."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
from transformers.trainer_utils import get_last_checkpoint

from marginrm.errors import ConfigError
from marginrm.loading import load_for_training
from marginrm.manifest import Manifest, MethodInfo
from marginrm_training.config import TrainConfig, expand
from marginrm_training.data import Splits, load_splits
from marginrm_training.export import RunRecord, export
from marginrm_training.margins import MarginMethod
from marginrm_training.trainer import MarginTrainer

_log = logging.getLogger(__name__)


def train(config: TrainConfig, *, resume: bool = True, dry_run: bool = False) -> Manifest | None:
    """Trains, calibrates, evaluates and writes a checkpoint.

    Args:
        config: The run.
        resume: Whether to go on from the last saved step, if there is one of this very run.
        dry_run: Stop after reading and checking the data, and say what would be done.

    Returns:
        The checkpoint's manifest; None after a dry run.

    Raises:
        MarginRMError: A setting, a file or the model is unusable; found before the first step where possible.
    """
    output = Path(expand(config.output))
    module, encoder = load_for_training(
        expand(config.model.path),
        seed=config.seed,
        max_length=config.model.max_length,
        trust_remote_code=config.model.trust_remote_code,
    )
    method = config.method.method()
    splits = load_splits(config.data, encoder, method, config.seed)
    for split in (splits.train, splits.calibration, splits.test):
        print(split.summary())  # noqa: T201 - what a command tells its user
    print(f"forward path: {module.forward_reason}")  # noqa: T201
    trainer = MarginTrainer(module, splits.train.pairs, config, output / "trainer")
    if dry_run:
        print(plan(config, splits, sum(weight.numel() for weight in module.parameters())))  # noqa: T201
        return None
    trainer.train(resume_from_checkpoint=last_step(config, output / "trainer") if resume else None)
    record = RunRecord(
        name=output.name,
        base_model=config.model.path,
        method=method_info(config, method, trainer.history),
        files=splits.files,
        training=config.model_dump(mode="json"),
        truncation=config.data.too_long,
    )
    manifest = export(output, module, encoder, splits, record)
    curve = "".join(json.dumps(entry) + "\n" for entry in trainer.history)
    (output / "learning_curve.jsonl").write_text(curve, encoding="utf-8")
    shutil.rmtree(output / "trainer", ignore_errors=True)
    return manifest


def last_step(config: TrainConfig, run_dir: Path) -> str | None:
    """Returns the folder to resume from, and notes whose run this is.

    Raises:
        ConfigError: The saved steps belong to another configuration.
    """
    note = run_dir / "run.json"
    now = config.model_dump(mode="json")
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != now:
        raise ConfigError(
            f"{run_dir} holds the steps of a run with other settings. Go on with those, choose another output, or "
            "start over with --no-resume."
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(now), encoding="utf-8")
    found: str | None = get_last_checkpoint(str(run_dir))
    if found:
        print(f"resuming from {found}")  # noqa: T201 - what a command tells its user
    return found


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
        fire_rate=float(np.mean([entry["fire_rate"] for entry in history])) if history else None,
        mean_target_margin=float(np.mean([entry["target_margin"] for entry in history])) if history else None,
    )


def plan(config: TrainConfig, splits: Splits, parameters: int) -> str:
    """Returns what a dry run tells: steps, tokens and what they cost."""
    pairs = len(splits.train.pairs)
    lengths = np.array([len(side.ids) for pair in splits.train.pairs for side in (pair.chosen, pair.rejected)])
    steps = int(np.ceil(pairs * config.optim.epochs / config.optim.pairs_per_step))
    quantiles = ", ".join(f"{share:.0%}: {int(np.quantile(lengths, share)):,}" for share in (0.1, 0.5, 0.9, 0.99, 1.0))
    flops = 6.0 * parameters * float(lengths.sum()) * config.optim.epochs
    return "\n".join(
        [
            f"steps: {steps:,} of {config.optim.pairs_per_step} pairs, {config.optim.train_batch} a forward pass",
            f"tokens per response: {quantiles}",
            f"arithmetic: at most {flops / 1e12:,.1f} TFLOP (shared prompts save some of it)",
            f"weights, gradients and optimiser: {parameters * 16 / 2**30:.2f} GiB in float32",
        ]
    )
