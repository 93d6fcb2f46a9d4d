"""A trained module -> a checkpoint directory: weights, tokenizer, manifest, metrics, model card and report."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from marginrm.atomic_file import share_weights
from marginrm.calibration import Floats, calibrate
from marginrm.encoding import Encoder
from marginrm.forward.module import RewardModule
from marginrm.manifest import BestOfNMeasure, Calibration, DataFile, Manifest, MethodInfo, Uncertainty
from marginrm.reward_model import RewardModel
from marginrm_training.checkpoint.golden import golden_samples, tolerances
from marginrm_training.checkpoint.model_card import model_card
from marginrm_training.checkpoint.uncertainty import fit_uncertainty
from marginrm_training.data.splits import EncodedPair, Splits
from marginrm_training.evaluation.best_of_n import BestOfNPoint
from marginrm_training.evaluation.groups import Groups, score_groups
from marginrm_training.evaluation.pairs import PairRewards, evaluate, score_pairs
from marginrm_training.evaluation.style import calibrate_beside_style
from marginrm_training.report.run_report import Report

_log = logging.getLogger(__name__)
_LIBRARIES = ("marginrm", "torch", "transformers", "tokenizers", "accelerate", "numpy")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The part of a manifest and a report that only the run knows.

    Attributes:
        name: The checkpoint's name.
        base_model: Folder or Hub name of the model that it was trained from.
        method: Loss, estimator and filter, with the fire rate and the mean target margin.
        files: The data files.
        training: The configuration as it was run.
        truncation: The treatment of pairs that were too long, as `data.too_long` has it.
        history: The learning curve.
        before: Margins of the first test pairs before training, [pairs].
        groups: Candidates for the report's Best-of-N curve.
        style_control: Whether style was in the training loss; then T is fitted beside it too.
        choices: Candidates of held-out prompts to calibrate choices among them on.
        uncertainty: Whether rewards are to carry their uncertainty.
    """

    name: str
    base_model: str
    method: MethodInfo | None
    files: Sequence[DataFile]
    training: Mapping[str, Any]
    truncation: str
    history: Sequence[Mapping[str, float]] = ()
    before: Floats | None = None
    groups: Groups | None = None
    style_control: bool = False
    choices: Groups | None = None
    uncertainty: bool = False


def export(directory: Path, module: RewardModule, encoder: Encoder, splits: Splits, record: RunRecord) -> Manifest:
    """Calibrates, evaluates and writes a checkpoint. The manifest follows the weights: with one, a checkpoint is complete.

    Args:
        directory: The folder to write.
        module: The trained module.
        encoder: Its encoder.
        splits: The temperature is fitted on `calibration`, the metrics are those of `test`.
        record: The run's part of manifest and report.

    Returns:
        The manifest, also written to the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    module.classifier.save_pretrained(directory)
    encoder.tokenizer.save_pretrained(directory)
    share_weights(directory)
    # Measured and recorded is the checkpoint as a server will load it, not the module in memory.
    served = RewardModel.from_pretrained(directory, dtype="float32", max_length=encoder.max_length)
    calibration, uncertainty = _calibrated(directory, served, splits, record)
    rewards = score_pairs(served, splits.test.pairs, progress=True)
    alone = uncertainty.temperature_alone if uncertainty else None
    metrics = evaluate(rewards, splits.test.pairs, calibration.temperature, alone)
    curve = _curve(served, record.groups) if record.groups else ()
    manifest = _manifest(served, record, calibration, rewards, metrics, splits.test.pairs).model_copy(
        update={
            "uncertainty": uncertainty,
            "best_of_n": [BestOfNMeasure(**asdict(point)) for point in curve],
            "groups": score_groups(served, record.choices).calibrate(calibration.temperature)
            if record.choices
            else None,
        }
    )
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(model_card(manifest), encoding="utf-8")
    manifest.save(directory)
    if left_out := _left_out(splits):
        (directory / "left_out.json").write_text(json.dumps(left_out, indent=1) + "\n", encoding="utf-8")
    log = "".join(json.dumps(entry) + "\n" for entry in record.history)
    (directory / "learning_curve.jsonl").write_text(log, encoding="utf-8")
    Report(
        title=record.name,
        subtitle=f"Trained from {record.base_model}. {splits.test.summary()}",
        pairs=splits.test.pairs,
        rewards=rewards,
        temperature=calibration.temperature,
        metrics=metrics,
        history=record.history,
        before=record.before,
        best_of_n=curve,
    ).write(directory / "report.html")
    RewardModel.from_pretrained(directory, dtype="float32").verify_golden()
    return manifest


def _calibrated(
    directory: Path, served: RewardModel, splits: Splits, record: RunRecord
) -> tuple[Calibration, Uncertainty | None]:
    """Calibrates on the held-out pairs; with an uncertainty, the model's rewards carry it from then on."""
    held_out = splits.calibration.pairs
    if record.uncertainty:
        fitted = fit_uncertainty(served, held_out, splits.train.pairs)
        served.read_uncertainty(fitted.posterior)
        return fitted.calibration, fitted.save(directory)
    margins = score_pairs(served, held_out, progress=True).d
    calibration = calibrate_beside_style(margins, held_out) if record.style_control else calibrate(margins.tolist())
    return calibration, None


def _left_out(splits: Splits) -> dict[str, dict[str, list[str]]]:
    """Returns the `path:line` of every row that was left out, by split and reason."""
    parts = (splits.train, splits.calibration, splits.test)
    return {split.name: split.excluded.sources for split in parts if split.excluded.total}


def _curve(served: RewardModel, groups: Groups) -> list[BestOfNPoint]:
    scored = score_groups(served, groups)
    _log.info("Best-of-N: %s", scored.summary())
    points = scored.curve()
    if end := scored.curve_end(points):
        _log.info("Best-of-N: %s", end)
    return points


def _manifest(
    served: RewardModel,
    record: RunRecord,
    calibration: Calibration,
    rewards: PairRewards,
    metrics: dict[str, float],
    pairs: Sequence[EncodedPair],
) -> Manifest:
    encoding = served.encoder.describe().model_copy(update={"truncation": record.truncation})
    return Manifest(
        name=record.name,
        created=utc_now(),
        base_model=record.base_model,
        method=record.method,
        data=list(record.files),
        encoding=encoding,
        reward_mean=metrics["reward_mean"],
        reward_std=metrics["reward_std"],
        calibration=calibration,
        metrics=metrics,
        versions=library_versions(),
        golden=golden_samples(rewards, pairs),
        golden_tolerance=tolerances(rewards),
        training=dict(record.training),
    )


def library_versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that rewards depend on."""
    return {"python": platform.python_version()} | {library: version(library) for library in _LIBRARIES}


def utc_now() -> str:
    """Returns the current time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
