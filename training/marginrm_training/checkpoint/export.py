"""A trained module -> a checkpoint directory: weights, tokenizer, manifest with golden samples, metrics and a model card."""

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

import numpy as np

from marginrm.calibration import Floats, calibrate
from marginrm.encoding import Encoder
from marginrm.forward.module import RewardModule
from marginrm.manifest import BestOfNMeasure, Calibration, DataFile, GoldenSample, Manifest, MethodInfo
from marginrm.preferences import CandidateGroup
from marginrm.reward_model import RewardModel
from marginrm_training.data.splits import EncodedPair, Splits
from marginrm_training.evaluation.best_of_n import BestOfNPoint, best_of_n_curve, curve_end
from marginrm_training.evaluation.groups import score_groups
from marginrm_training.evaluation.pairs import PairRewards, evaluate, score_pairs
from marginrm_training.report.run_report import Report

_log = logging.getLogger(__name__)
_GOLDEN_PAIRS = 4
# How far a golden reward may lie from the recorded float32 one, as a share of the larger of 1 and the largest reward.
# Rounding differs between processors; a wrong tokenizer, template or weight file is off by far more.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
_MEANING = (
    "Rewards have no unit and no zero: only differences between responses to one prompt, from this checkpoint, mean "
    "something. The confidence that the first is better is sigmoid(difference / T)."
)
_RECORDED = (
    "`reward_manifest.json` records data, method, encoding, calibration and golden samples, which hold the texts of a "
    "few held-out pairs."
)
_LIBRARIES = ("marginrm", "torch", "transformers", "tokenizers", "accelerate", "numpy")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run leaves for its manifest.

    Attributes:
        name: The checkpoint's name.
        base_model: What it was trained from.
        method: Loss, estimator and filter, and what they did.
        files: The data files.
        training: The configuration as it was run.
        truncation: What happened to pairs that were too long.
        history: The step log.
        before: Margins of the first test pairs before training, [pairs].
        groups: Candidates for the report's Best-of-N curve.
    """

    name: str
    base_model: str
    method: MethodInfo | None
    files: Sequence[DataFile]
    training: Mapping[str, Any]
    truncation: str
    history: Sequence[Mapping[str, float]] = ()
    before: Floats | None = None
    groups: Sequence[CandidateGroup] = ()


def export(directory: Path, module: RewardModule, encoder: Encoder, splits: Splits, record: RunRecord) -> Manifest:
    """Calibrates, evaluates and writes a checkpoint; the manifest comes last, so a checkpoint with one is whole.

    Args:
        directory: Where to write.
        module: The trained module.
        encoder: Its encoder.
        splits: The temperature is fitted on `calibration`, the metrics are those of `test`.
        record: What the manifest says of the run.

    Returns:
        The manifest, also written to the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    module.classifier.save_pretrained(directory)
    encoder.tokenizer.save_pretrained(directory)
    # What is measured and recorded is the checkpoint as a server will load it, not the module in memory.
    served = RewardModel.from_pretrained(directory, dtype="float32", max_length=encoder.max_length)
    fitted = score_pairs(served, splits.calibration.pairs, progress=True)
    calibration = calibrate(fitted.d.tolist())
    rewards = score_pairs(served, splits.test.pairs, progress=True)
    metrics = evaluate(rewards, splits.test.pairs, calibration.temperature)
    curve = _curve(served, record.groups) if record.groups else ()
    manifest = _manifest(served, record, calibration, rewards, metrics, splits.test.pairs).model_copy(
        update={"best_of_n": [BestOfNMeasure(**asdict(point)) for point in curve]}
    )
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(model_card(manifest), encoding="utf-8")
    manifest.save(directory)
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


def recalibrated(model: RewardModel, name: str, calibration: Calibration, pairs: Sequence[EncodedPair]) -> Manifest:
    """Returns the manifest of a checkpoint with another calibration; one is begun for a plain Hugging Face model."""
    rewards = score_pairs(model, pairs[:_GOLDEN_PAIRS])
    base = model.manifest or Manifest(
        name=name,
        created=_now(),
        base_model=model.info.base_model,
        encoding=model.encoder.describe(),
        versions=_versions(),
        golden=golden_samples(rewards, pairs),
        golden_tolerance=tolerances(rewards),
    )
    return base.model_copy(update={"calibration": calibration})


def golden_samples(rewards: PairRewards, pairs: Sequence[EncodedPair]) -> list[GoldenSample]:
    """Returns the first few pairs' responses with their token ids and rewards."""
    samples = []
    for pair, chosen, rejected in zip(pairs[:_GOLDEN_PAIRS], rewards.chosen, rewards.rejected, strict=False):
        prompt = pair.pair.prompt
        text = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
        for response, encoded, reward in (
            (pair.pair.chosen, pair.chosen, chosen),
            (pair.pair.rejected, pair.rejected, rejected),
        ):
            if not encoded.truncated:  # a server refuses what is too long unless asked
                samples.append(
                    GoldenSample(prompt=text, response=response, ids=list(encoded.ids), reward=float(reward))
                )
    return samples


def tolerances(rewards: PairRewards) -> dict[str, float]:
    """Returns by how much a golden reward may differ, for each dtype."""
    largest = max(1.0, float(np.abs(np.concatenate([rewards.chosen, rewards.rejected])).max()))
    return {dtype: share * largest for dtype, share in _TOLERANCE.items()}


def model_card(manifest: Manifest) -> str:
    """Returns a README for the checkpoint."""
    method, calibration, metrics = manifest.method, manifest.calibration, manifest.metrics
    lines = [
        "---",
        "library_name: transformers",
        "tags: [reward-model, margin]",
        "---",
        f"# {manifest.name}",
        "",
        f"A reward model trained by marginrm from `{manifest.base_model}`"
        + (f" with the `{method.preset}` preset." if method else "."),
        "",
        "| measured on held-out pairs | |",
        "|---|---:|",
        *(
            f"| {name} | {metrics[name]:.4f} |"
            for name in ("accuracy", "bt_nll", "ece_before", "ece", "brier", "margin_mean", "margin_std")
            if name in metrics
        ),
        "",
        _MEANING + f" T is {calibration.temperature:.3f}." if calibration else _MEANING + " T is not fitted yet.",
        "",
        "```sh",
        "marginrm serve --model .",
        "```",
        "",
        _RECORDED,
    ]
    return "\n".join(lines) + "\n"


def _curve(served: RewardModel, groups: Sequence[CandidateGroup]) -> list[BestOfNPoint]:
    scored = score_groups(served, groups)
    _log.info("Best-of-N: %s", scored.summary())
    points = best_of_n_curve(scored.rewards, scored.gold, scored.lengths)
    if end := curve_end(points, scored.gold):
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
        created=_now(),
        base_model=record.base_model,
        method=record.method,
        data=list(record.files),
        encoding=encoding,
        reward_mean=metrics["reward_mean"],
        reward_std=metrics["reward_std"],
        calibration=calibration,
        metrics=metrics,
        versions=_versions(),
        golden=golden_samples(rewards, pairs),
        golden_tolerance=tolerances(rewards),
        training=dict(record.training),
    )


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {library: version(library) for library in _LIBRARIES}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
