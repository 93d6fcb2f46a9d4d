"""One run of an ablation, as a process: train, measure on every file, keep the numbers.

python -m marginrm_training.ablation.worker FOLDER     # FOLDER/spec.json -> FOLDER/result.json
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from marginrm.calibration import Floats
from marginrm.errors import ConfigError
from marginrm.manifest import Manifest
from marginrm.preferences import read_groups
from marginrm.reward_model import RewardModel
from marginrm_training.ablation.plan import FLIP, RESULT, SPEC, Evaluation
from marginrm_training.config import TrainConfig, expand, parse_config
from marginrm_training.data.label_noise import flip_labels
from marginrm_training.data.sources import read_source
from marginrm_training.data.splits import encode_pairs
from marginrm_training.evaluation.groups import score_groups
from marginrm_training.evaluation.pairs import evaluate, score_pairs, spearman
from marginrm_training.files import replace_file
from marginrm_training.method.margins import MarginMethod
from marginrm_training.run.train import train


def main(folder: Path) -> None:
    """Makes the run that `spec.json` in a folder describes; `result.json` comes last, so a run with one is complete."""
    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    config = _configured(folder, spec)
    checkpoint = Path(config.output)
    manifest, seconds = _trained(folder, config)
    evaluations = [Evaluation.model_validate(item) for item in spec["evaluations"]]
    metrics, arrays = measure_all(checkpoint, config, evaluations)
    result = {name: spec[name] for name in ("run", "digest", "variant", "axes", "seed", "config")} | {
        "train": training_figures(manifest) | {"seconds": seconds, "peak_memory_gib": peak_memory_gib()},
        "evaluations": metrics,
        "arrays": {name: values.tolist() for name, values in arrays.items()},
    }
    if not spec["keep_checkpoints"]:
        shutil.rmtree(checkpoint)
    replace_file(folder / RESULT, json.dumps(result))


def measure_all(
    checkpoint: Path, config: TrainConfig, evaluations: Iterable[Evaluation]
) -> tuple[dict[str, dict[str, float]], dict[str, Floats]]:
    """Returns by evaluation what a checkpoint measures there: its metrics, and margins or qualities of the picks.

    Args:
        checkpoint: The folder.
        config: How it was trained; it computes in that dtype.
        evaluations: What it is measured on.
    """
    metrics: dict[str, dict[str, float]] = {}
    arrays: dict[str, Floats] = {}
    for evaluation in evaluations:
        measure = measure_pairs if evaluation.kind == "pairs" else measure_best_of_n
        model = RewardModel.from_pretrained(checkpoint, dtype=config.model.dtype, max_length=evaluation.max_length)
        metrics[evaluation.name], arrays[evaluation.name] = measure(model, evaluation)
    return metrics, arrays


def measure_pairs(model: RewardModel, evaluation: Evaluation) -> tuple[dict[str, float], Floats]:
    """Returns the metrics on preference pairs, and the margins d, [pairs].

    Prompts of pairs that are too long are cut from the left; pairs whose responses alone are too long are left out,
    counted under `unusable`.
    """
    source = read_source(evaluation.path, expand(evaluation.path), evaluation.format)
    rows = source.pairs[: evaluation.limit]
    split = encode_pairs(evaluation.name, rows, model.encoder, MarginMethod(), "prompt_left")
    rewards = score_pairs(model, split.pairs)
    metrics = evaluate(rewards, split.pairs, model.temperature)
    metrics |= {"unusable": float(len(rows) - len(split.pairs)), "truncated": float(split.truncated)}
    truth = [pair.pair.extra.get("true_margin") for pair in split.pairs]
    if truth and None not in truth:
        metrics["spearman"] = spearman(rewards.d.tolist(), [float(value) for value in truth if value is not None])
    return metrics, rewards.d


def measure_best_of_n(model: RewardModel, evaluation: Evaluation) -> tuple[dict[str, float], Floats]:
    """Returns the mean gold quality of the pick among all candidates of a prompt, and each prompt's, [prompts]."""
    groups = list(read_groups(expand(evaluation.path)))[: evaluation.limit]
    scored = score_groups(model, groups)
    picks = np.array([gold[int(np.argmax(rewards))] for rewards, gold in zip(scored.rewards, scored.gold, strict=True)])
    longest = [gold[int(np.argmax(lengths))] for lengths, gold in zip(scored.lengths, scored.gold, strict=True)]
    metrics = {
        "prompts": float(len(picks)),
        "pick": float(picks.mean()),
        "random": float(np.mean([np.mean(gold) for gold in scored.gold])),
        "longest": float(np.mean(longest)),
        "oracle": float(np.mean([max(gold) for gold in scored.gold])),
        "truncated": float(scored.truncated),
        "unusable": float(np.isneginf([reward for rewards in scored.rewards for reward in rewards]).sum()),
    }
    return metrics, picks


def training_figures(manifest: Manifest) -> dict[str, float]:
    """Returns what the manifest says of the training."""
    figures = {f"test_{name}": value for name, value in manifest.metrics.items()}
    if manifest.method:
        found = {"fire_rate": manifest.method.fire_rate, "mean_target_margin": manifest.method.mean_target_margin}
        figures |= {name: value for name, value in found.items() if value is not None}
    if manifest.calibration:
        figures["temperature"] = manifest.calibration.temperature
    return figures


def peak_memory_gib() -> float:
    """Returns the most memory that this process has held, in GiB: on the GPU, where it has used one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _configured(folder: Path, spec: Mapping[str, Any]) -> TrainConfig:
    """Returns the training configuration, with the training file replaced by one with wrong labels if any are asked."""
    raw = spec["config"]
    share = spec["axes"].get(FLIP)
    if share:
        flipped = folder / "train.jsonl"
        flip_labels(Path(expand(raw["data"]["train"])), flipped, share, spec["seed"])
        raw = raw | {"data": raw["data"] | {"train": str(flipped)}}
    return parse_config(raw, str(folder))


def _trained(folder: Path, config: TrainConfig) -> tuple[Manifest, float]:
    """Trains, or takes the checkpoint of a run that was ended between training and measuring."""
    timing = folder / "seconds"
    manifest = Manifest.load(config.output) if timing.is_file() else None
    if manifest:
        return manifest, float(timing.read_text(encoding="utf-8"))
    started = time.perf_counter()
    manifest = train(config)
    if manifest is None:
        raise ConfigError("An ablation runs on one process per run; start it without a launcher.")
    seconds = time.perf_counter() - started
    timing.write_text(str(seconds), encoding="utf-8")
    return manifest, seconds


if __name__ == "__main__":
    main(Path(sys.argv[1]))
