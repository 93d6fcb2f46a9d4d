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

import torch

from marginrm.atomic_file import replace_file
from marginrm.calibration import Floats
from marginrm.errors import ConfigError
from marginrm.manifest import Manifest
from marginrm.reward_model import RewardModel
from marginrm_training.ablation.plan import FLIP, RESULT, SPEC, Evaluation
from marginrm_training.config import TrainConfig, expand, parse_config
from marginrm_training.data.label_noise import flip_labels
from marginrm_training.evaluation.measure import measure_candidates, measure_pairs
from marginrm_training.evaluation.pairs import true_margin_correlation
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
    """Returns a checkpoint's metrics, and its margins or the qualities of its picks, by evaluation.

    Args:
        checkpoint: The folder.
        config: The configuration of its training; the checkpoint is measured in the same dtype.
        evaluations: The files.
    """
    metrics: dict[str, dict[str, float]] = {}
    arrays: dict[str, Floats] = {}
    for evaluation in evaluations:
        metrics[evaluation.name], arrays[evaluation.name] = measure(checkpoint, config, evaluation)
    return metrics, arrays


def measure(checkpoint: Path, config: TrainConfig, evaluation: Evaluation) -> tuple[dict[str, float], Floats]:
    """Returns a checkpoint's metrics on one file, and its margins, [pairs], or the qualities of its picks, [prompts].

    Prompts that are too long are cut from the left. Pairs whose responses alone are too long are left out, and counted
    under `unusable`; such candidates are never picked.
    """
    model = RewardModel.from_pretrained(checkpoint, dtype=config.model.dtype, max_length=evaluation.max_length)
    if evaluation.kind == "best_of_n":
        scored = measure_candidates(model, evaluation.path, limit=evaluation.limit)
        return scored.pick_metrics(), scored.picks()
    measured = measure_pairs(
        model,
        evaluation.path,
        form=evaluation.format,
        too_long="prompt_left",
        limit=evaluation.limit,
        progress=False,
    )
    d, split = measured.rewards.d, measured.split
    metrics = measured.metrics | {"unusable": float(measured.unusable), "truncated": float(split.truncated)}
    correlation = true_margin_correlation(d, split.pairs)
    return metrics | ({} if correlation is None else {"spearman": correlation}), d


def training_figures(manifest: Manifest) -> dict[str, float]:
    """Returns the figures of the training that the manifest records."""
    figures = {f"test_{name}": value for name, value in manifest.metrics.items()}
    if manifest.method:
        found = {"fire_rate": manifest.method.fire_rate, "mean_target_margin": manifest.method.mean_target_margin}
        figures |= {name: value for name, value in found.items() if value is not None}
    if manifest.calibration:
        figures["temperature"] = manifest.calibration.temperature
    return figures


def peak_memory_gib() -> float:
    """Returns the peak memory of this process in GiB: of the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _configured(folder: Path, spec: Mapping[str, Any]) -> TrainConfig:
    """Returns the training configuration; a `flip` axis replaces the training file by one with swapped labels."""
    raw = spec["config"]
    share = spec["axes"].get(FLIP)
    if share:
        if "train" not in raw["data"]:
            raise ConfigError("The axis `flip` swaps the labels of data.train; it cannot be used with data.sources.")
        flipped = folder / "train.jsonl"
        flip_labels(Path(expand(raw["data"]["train"])), flipped, share, spec["seed"])
        raw = raw | {"data": raw["data"] | {"train": str(flipped)}}
    return parse_config(raw, str(folder))


def _trained(folder: Path, config: TrainConfig) -> tuple[Manifest, float]:
    """Returns manifest and seconds of the training, or of an earlier one that was ended before it was measured."""
    timing = folder / "seconds"
    manifest = Manifest.load(config.output) if timing.is_file() else None
    if manifest:
        return manifest, float(timing.read_text(encoding="utf-8"))
    started = time.perf_counter()
    manifest = train(config)
    if manifest is None:
        raise ConfigError("An ablation trains each run in one process; start it without a launcher.")
    seconds = time.perf_counter() - started
    timing.write_text(str(seconds), encoding="utf-8")
    return manifest, seconds


if __name__ == "__main__":
    main(Path(sys.argv[1]))
