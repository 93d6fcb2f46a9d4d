"""The audit on the demo's data with a known share of exchanged labels: precision, and the accuracy that it wins back.

python -m benchmarks.training.audit runs/audit_demo --flip 0.1 0.2 --pairs 2400 --folds 3
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from marginrm import RewardModel
from marginrm_training.audit.cli import write_without
from marginrm_training.audit.cross_fit import audited_pairs, cross_fit, folds_by_prompt
from marginrm_training.audit.suspects import fit_label_noise, in_units, suspects
from marginrm_training.config import TrainConfig, parse_config
from marginrm_training.data.label_noise import flip_labels
from marginrm_training.demo.build import write_data, write_untrained
from marginrm_training.demo.preferences import generate_pairs
from marginrm_training.demo.recipe import RECIPE
from marginrm_training.evaluation.measure import measure_pairs
from marginrm_training.run.train import train


def config_of(folder: Path, name: str, data: dict[str, Path]) -> TrainConfig:
    """Returns the demo's run on some training file, with hard labels (`bt`): auditors have no grades."""
    raw = {
        "output": str(folder / name),
        "save_every": 100_000,
        "model": {"path": str(folder / "start"), "max_length": RECIPE.max_length},
        "data": {split: str(path) for split, path in data.items()},
        "method": {"preset": "bt"},
        "optim": {
            "learning_rate": RECIPE.learning_rate,
            "pairs_per_step": RECIPE.pairs_per_step,
            "train_batch": RECIPE.pairs_per_step,
            "warmup_ratio": 0.1,
        },
    }
    return parse_config(raw, name)


def accuracy(config: TrainConfig) -> float:
    """Trains a run, and returns its accuracy on the test pairs, whose labels are right."""
    train(config)
    found = measure_pairs(RewardModel.from_pretrained(config.output, dtype="float32"), str(config.data.test))
    shutil.rmtree(config.output)
    return found.metrics["accuracy"]


def audited(folder: Path, data: dict[str, Path], share: float, folds: int, seed: int) -> dict[str, Any]:
    """Flips labels, audits them, and trains with and without the suspects."""
    name = f"flip{share:g}"
    noisy = {**data, "train": folder / f"{name}.jsonl"}
    flip_labels(data["train"], noisy["train"], share, seed)
    clean = [json.loads(line) for line in data["train"].read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in noisy["train"].read_text(encoding="utf-8").splitlines()]
    flipped = {index + 1 for index, (row, other) in enumerate(zip(rows, clean, strict=True)) if row != other}
    config = config_of(folder, name, noisy)
    pairs = audited_pairs(config).pairs
    work = folder / f"{name}-audit"
    work.mkdir(exist_ok=True)
    places = folds_by_prompt(pairs, folds, config.seed)
    margins = [cross_fit(config, pairs, fold, number, work, resume=True) for number, fold in enumerate(places, start=1)]
    d = np.empty(len(pairs))
    for fold, values in zip(places, in_units(margins), strict=True):
        d[fold] = values
    noise = fit_label_noise(d)
    ranked = suspects(pairs, d, noise, 0.0)
    lines = [int(one.pair.pair.source.rpartition(":")[2]) for one in ranked]
    listed = suspects(pairs, d, noise, 0.5)
    kept = folder / f"{name}-kept.jsonl"
    write_without(config, kept, {one.pair.pair.source for one in listed})
    found = {
        "flipped": len(flipped),
        "accuracy_out_of_fold": float((d > 0).mean()),
        "estimated_share": noise.share,
        "precision_first_n": float(np.mean([line in flipped for line in lines[: len(flipped)]])),
        "listed": len(listed),
        "precision_listed": float(np.mean([line in flipped for line in lines[: len(listed)]])) if listed else None,
        "recall_listed": sum(line in flipped for line in lines[: len(listed)]) / len(flipped),
    }
    print(json.dumps(found), flush=True)
    found["accuracy_without_suspects"] = accuracy(config_of(folder, f"{name}-without", {**data, "train": kept}))
    print(json.dumps(found), flush=True)
    found["accuracy_noisy"] = accuracy(config_of(folder, f"{name}-noisy", noisy))
    return found


def main() -> None:
    """Runs the experiment and prints its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--flip", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--pairs", type=int, default=4800)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    demo = generate_pairs(options.seed, options.pairs)
    data = write_data(demo, options.folder / "data")
    write_untrained(demo, options.folder / "start", options.seed, RECIPE)
    found: dict[str, Any] = {}
    for share in options.flip:
        found[f"flip {share:g}"] = audited(options.folder, data, share, options.folds, options.seed)
    found["accuracy_clean"] = accuracy(config_of(options.folder, "clean", data))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
