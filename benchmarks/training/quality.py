"""`python -m benchmarks.training.quality`: TRL's `RewardTrainer` on an ablation's pairs, compared with its variants.

For each seed the ablation's own loader draws and encodes the training pairs, TRL trains on those token ids in an
environment of its own, and its checkpoint is measured as every run of the ablation is. Finished seeds are kept in
`results.jsonl.gz`; the table compares them with the ablation's runs of the same seeds, item by item.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from transformers import PreTrainedModel

from benchmarks.harness.command import app_of
from benchmarks.harness.texts import Sample, TokenizedGroup
from benchmarks.harness.worker_process import WorkerProcess
from marginrm.calibration import Floats
from marginrm_training.ablation.plan import RESULTS, Ablation, Run, load_ablation, plan
from marginrm_training.ablation.results import Results, finished, item_scores, keep_result, read_results
from marginrm_training.ablation.worker import measure_all
from marginrm_training.config import TrainConfig, parse_config
from marginrm_training.data.splits import load_splits
from marginrm_training.evaluation.bootstrap import seeds_estimate
from marginrm_training.run.train import load

# RewardTrainer's defaults at the learning rate 5e-5; dropout is off there too.
SETTINGS = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {},
    "warmup_steps": 0,
    "adam_beta2": 0.999,
}
_EPOCH_SECONDS = 4 * 3600.0  # the most that an epoch may take; it takes over an hour on one core
Scores = dict[str, Floats]


def main(
    ablation: Annotated[Path, typer.Argument(help="The ablation whose base, seeds and evaluations are used.")] = Path(
        "examples/ablation_recipe.toml"
    ),
    trl_python: Annotated[
        Path | None, typer.Option(help="Interpreter of an environment with trl; without it, only the table is made.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated; by default those of the ablation.")] = "",
    max_length: Annotated[int, typer.Option(help="The most tokens that TRL trains on.")] = 256,
    results: Annotated[Path, typer.Option(help="Folder of results.jsonl.gz.")] = Path("docs/results/trl_alpaca"),
    output: Annotated[Path, typer.Option(help="Folder for models.")] = Path("runs/training_quality"),
) -> None:
    """Train TRL's RewardTrainer on the pairs of an ablation, and compare it with the ablation's finished runs."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    given = load_ablation(ablation)
    wanted = [int(seed) for seed in seeds.split(",")] if seeds else list(given.seeds)
    runs = {run.seed: run for run in plan(given) if run.variant == given.baseline}
    if unknown := set(wanted) - set(runs):
        raise typer.BadParameter(f"{ablation} has no seed {min(unknown)}: it has {', '.join(map(str, runs))}.")
    file = results / RESULTS
    for seed in wanted:
        label = _label(max_length, seed)
        if trl_python is not None and all(row["run"] != label for row in read_results(file)):
            typer.echo(f"seed {seed}: training", err=True)
            keep_result(file, _train(given, runs[seed], max_length, trl_python, output / label))
    typer.echo(table(given, file, max_length))


def _label(max_length: int, seed: int) -> str:
    return f"tokens{max_length}-seed{seed}"


def _train(ablation: Ablation, run: Run, max_length: int, python: Path, folder: Path) -> dict[str, Any]:
    """Trains with one seed and returns the row that is kept."""
    label = _label(max_length, run.seed)
    changed = run.config | {"output": str(folder), "model": run.config["model"] | {"max_length": max_length}}
    config = parse_config(changed, label)
    pairs = _prepare(config, folder / "start")
    with WorkerProcess("training.trl_trainer", python, {}, reply_seconds=_EPOCH_SECONDS) as trl:
        detail = trl.load(
            folder / "start",
            {
                "dtype": config.model.dtype,
                "batch": config.optim.pairs_per_step,
                "settings": SETTINGS | {"seed": run.seed, "data_seed": run.seed},
            },
        )
        trained = trl.run(pairs)
        metrics, arrays = measure_all(Path(trl.call("save")), config, ablation.evaluations)
    shutil.rmtree(folder)
    return {
        "run": label,
        "digest": f"{run.digest}-{label}",
        "seed": run.seed,
        "pairs": len(pairs.groups),
        "detail": detail,
        "seconds": trained.seconds,
        "losses": trained.values,
        "evaluations": metrics,
        "arrays": {name: values.tolist() for name, values in arrays.items()},
    }


def _prepare(config: TrainConfig, start: Path) -> Sample:
    """Writes the backbone, to which TRL adds a head, and returns the training pairs as its token ids.

    TRL passes no segment ids, so the saved tokenizer names none: the checkpoint is then measured without them too.
    """
    module, encoder = load(config)
    encoder.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    cast("PreTrainedModel", module.backbone).save_pretrained(start)
    encoder.tokenizer.save_pretrained(start)
    splits = load_splits(config.data, encoder, config.method.method(), config.seed)
    return Sample(
        tuple(
            TokenizedGroup(
                str(pair.pair.prompt),
                (pair.pair.chosen, pair.pair.rejected),
                (pair.chosen.ids, pair.rejected.ids),
                (None, None),
            )
            for pair in splits.train.pairs
        )
    )


def table(ablation: Ablation, file: Path, max_length: int) -> str:
    """Returns TRL's figures, and each variant's difference to them over the seeds that both have.

    Args:
        ablation: The ablation.
        file: TRL's results.
        max_length: The most tokens that TRL trained on.
    """
    labels = {_label(max_length, seed) for seed in ablation.seeds}
    peer = {
        row["seed"]: _values(ablation, {name: np.array(values) for name, values in row["arrays"].items()})
        for row in read_results(file)
        if row["run"] in labels
    }
    rows = [(f"TRL, {max_length} tokens", peer)] if peer else []
    if found := finished(ablation.results_file, plan(ablation)):
        loaded = Results.load(ablation, found)
        for cell, runs in loaded.cells.items():
            ours = {run["seed"]: _values(ablation, loaded.arrays[run["digest"]]) for run in runs}
            rows.append((loaded.label(cell), ours))
    if not rows:
        return f"Nothing to compare: neither {file} nor {ablation.results_file} holds a finished run."
    names = list(next(iter(rows[0][1].values())))
    lines = ["| | seeds | " + " | ".join(f"{name} | difference to TRL" for name in names) + " |"]
    lines.append("|---|---:|" + "---:|---:|" * len(names))
    lines += [_row(label, names, scores, None if scores is peer else peer) for label, scores in rows]
    return "\n".join(lines)


def _values(ablation: Ablation, arrays: Mapping[str, Floats]) -> Scores:
    """Returns the figure of each item, by the name of its column."""
    values: Scores = {}
    for evaluation in ablation.evaluations:
        values[evaluation.name] = item_scores(evaluation, arrays)
        if evaluation.kind == "pairs":
            values[f"{evaluation.name}, BT loss"] = np.logaddexp(0, -arrays[evaluation.name])
    return values


def _row(label: str, names: list[str], ours: Mapping[int, Scores], peer: Mapping[int, Scores] | None) -> str:
    cells = []
    for name in names:
        means = np.array([scores[name].mean() for scores in ours.values()])
        cells.append(f"{means.mean():.3f}" + (f" ± {means.std(ddof=1):.3f}" if len(means) > 1 else ""))
        shared = sorted(set(ours) & set(peer or ()))
        cells.append("")
        if peer and shared:
            difference = np.stack([ours[seed][name] - peer[seed][name] for seed in shared])
            cells[-1] = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*seeds_estimate(difference))
    return f"| {label} | {len(ours)} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    app_of(main)()
