"""`marginrm demo`: data, a tokenizer and a random model, and then an ordinary training run."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from transformers import GPTNeoXForSequenceClassification

from marginrm.reward_model import RewardModel
from marginrm_training.config import TrainConfig, parse_config
from marginrm_training.demo.model import build_model, build_tokenizer
from marginrm_training.demo.preferences import DemoData, generate_pairs, write_jsonl
from marginrm_training.demo.recipe import RECIPE, DemoRecipe
from marginrm_training.evaluation.measure import measure_pairs
from marginrm_training.evaluation.pairs import true_margin_correlation
from marginrm_training.run.train import train


def build_demo(output: Path, seed: int = 0, recipe: DemoRecipe = RECIPE) -> str:
    """Trains the demo reward model and writes its checkpoint.

    Args:
        output: Folder of the checkpoint; the data stay in its `data/`.
        seed: Seed of data, weights and order.
        recipe: Shape and optimiser.

    Returns:
        The measures on held-out prompts, as text.
    """
    data = generate_pairs(seed)
    paths = write_data(data, output / "data")
    start = output / "untrained-gpt-neox"
    model = write_untrained(data, start, seed, recipe)
    print(  # noqa: T201 - what a command tells its user
        f"Training the demo reward model ({model.num_parameters() / 1e6:.1f} M parameters, {len(data.train):,} pairs). "
        "It takes about two minutes on two cores."
    )
    started = time.perf_counter()
    manifest = train(demo_config(output, start, paths, seed, recipe), resume=False)
    seconds = time.perf_counter() - started
    shutil.rmtree(start)
    assert manifest is not None  # not a dry run
    assert manifest.calibration is not None
    measured = measure_pairs(RewardModel.from_pretrained(output, dtype="float32"), str(paths["test"]))
    rank = true_margin_correlation(measured.rewards.d, measured.split.pairs)
    return (
        f"On {manifest.metrics['pairs']:.0f} pairs of held-out prompts: accuracy {manifest.metrics['accuracy']:.3f}, "
        f"Spearman of margin and true margin {rank:.3f}, ECE {manifest.metrics['ece_before']:.3f} before and "
        f"{manifest.metrics['ece']:.3f} after calibration (T = {manifest.calibration.temperature:.2f}). "
        f"Took {seconds:.0f} s; written to {output}."
    )


def write_demo(folder: Path) -> None:
    """Writes the demo's data to `folder`/data and its untrained model to `folder`/start."""
    data = generate_pairs(0)
    write_data(data, folder / "data")
    write_untrained(data, folder / "start", 0, RECIPE)


def write_untrained(data: DemoData, folder: Path, seed: int, recipe: DemoRecipe) -> GPTNeoXForSequenceClassification:
    """Writes a tokenizer made from the training texts and a model drawn at random, and returns the model."""
    texts = [text for pair in data.train for text in (pair.prompt, pair.chosen, pair.rejected)]
    tokenizer = build_tokenizer(texts, recipe)
    model = build_model(tokenizer, recipe, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_data(data: DemoData, folder: Path) -> dict[str, Path]:
    """Writes the splits as files that `marginrm train` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in ("train", "calibration", "test")}
    for name, path in paths.items():
        write_jsonl(getattr(data, name), path)
    return paths


def demo_config(output: Path, start: Path, paths: dict[str, Path], seed: int, recipe: DemoRecipe) -> TrainConfig:
    """Returns the demo as an ordinary training configuration."""
    raw = {
        "output": str(output),
        "seed": seed,
        "log_every": 5,
        "save_every": 100_000,
        "model": {"path": str(start), "max_length": recipe.max_length},
        "data": {name: str(path) for name, path in paths.items()},
        "method": {"preset": recipe.preset},
        "optim": {
            "learning_rate": recipe.learning_rate,
            "epochs": recipe.epochs,
            "pairs_per_step": recipe.pairs_per_step,
            "train_batch": recipe.pairs_per_step,
            "warmup_ratio": 0.1,
        },
    }
    return parse_config(raw, "demo")
