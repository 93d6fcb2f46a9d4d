"""Style control on the demo's data with a planted taste for markdown: is the effect recovered, and is it removed?

    python -m benchmarks.training.style runs/style_demo --pairs 2400

Either response of a pair gets markdown at random. A Bradley-Terry judge labels the pair by the difference in quality plus
`--effect` for the markdown. The demo's model is trained on these labels without and with style control. On held-out
prompts it is measured against the true quality.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from marginrm import RewardModel
from marginrm.calibration import correctness
from marginrm.ranking import sigmoid
from marginrm_training.config import parse_config
from marginrm_training.data.splits import encode_pairs, read
from marginrm_training.demo.build import write_untrained
from marginrm_training.demo.preferences import DemoPair, generate_pairs, write_jsonl
from marginrm_training.demo.recipe import RECIPE
from marginrm_training.evaluation.pairs import score_pairs
from marginrm_training.method.margins import MarginMethod
from marginrm_training.method.style import FEATURES, fit_beside_style, style_differences
from marginrm_training.run.train import train


def adorned(text: str) -> str:
    """Returns a response with markdown around it: a heading, a bold span and a list of two items."""
    return f"## Answer\n\n**In short:** {text}\n\n- Point one\n- Point two"


def planted(pairs: Sequence[DemoPair], effect: float, seed: int, *, label: bool) -> tuple[list[DemoPair], list[int]]:
    """Returns pairs with markdown on either side at random, and 1, 0 or -1 for markdown on chosen, both or rejected.

    Args:
        pairs: Plain pairs.
        effect: Log odds that markdown adds for the judge.
        seed: Seed of the draws.
        label: Whether the judge's taste decides the label; otherwise chosen stays the truly better response.
    """
    random = Random(f"{seed}:style")
    made, sides = [], []
    for pair in pairs:
        first, second = random.random() < 0.5, random.random() < 0.5
        new = replace(
            pair,
            chosen=adorned(pair.chosen) if first else pair.chosen,
            rejected=adorned(pair.rejected) if second else pair.rejected,
        )
        side = int(first) - int(second)
        if label and random.random() >= sigmoid(pair.true_margin + effect * side):
            new = replace(new, chosen=new.rejected, rejected=new.chosen, true_margin=-pair.true_margin)
            side = -side
        made.append(new)
        sides.append(side)
    return made, sides


def measured(checkpoint: Path, test: Path, plain: Sequence[DemoPair], sides: Sequence[int]) -> dict[str, float]:
    """Returns accuracy against the true quality by side of the markdown, and the reward that markdown alone adds."""
    model = RewardModel.from_pretrained(checkpoint, dtype="float32")
    pairs = encode_pairs("test", read(str(test)), model.encoder, MarginMethod()).pairs
    kept = np.array([sides[int(pair.pair.source.rpartition(":")[2]) - 1] for pair in pairs])
    d = score_pairs(model, pairs).d
    right = correctness(d)
    added = [model.score(pair.prompt, [adorned(pair.chosen), pair.chosen]) for pair in plain[:100]]
    return {
        "accuracy": float(right.mean()),
        "accuracy_markdown_better": float(right[kept == 1].mean()),
        "accuracy_markdown_worse": float(right[kept == -1].mean()),
        "margin_std": float(d.std()),
        "markdown_adds": float(np.mean([first - second for first, second in added])),
    }


def run(folder: Path, pairs: int, effect: float, seed: int) -> dict[str, Any]:
    """Trains both models and returns their measures, the effect that b recovered, and that of the judge's own qualities."""
    data = generate_pairs(seed, pairs)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    paths = {name: str(folder / "data" / f"{name}.jsonl") for name in ("train", "calibration", "test")}
    sides: dict[str, list[int]] = {}
    for name, path in paths.items():
        made, sides[name] = planted(getattr(data, name), effect, seed, label=name != "test")
        write_jsonl(made, Path(path))
        if name == "train":
            judged = made
    markdown = np.array(sides["train"], dtype=np.float64)[:, None] * np.ones((1, len(FEATURES)))
    known = fit_beside_style(np.array([pair.true_margin for pair in judged]), markdown)
    spread = float(np.sqrt(np.mean(markdown[:, 0] ** 2)))
    found: dict[str, Any] = {"planted": effect, "with_known_qualities": sum(known.weights.values()) / spread}
    write_untrained(data, folder / "start", seed, RECIPE)
    for name in ("bt", "style_control"):
        output = folder / name
        config = {
            "output": str(output),
            "seed": seed,
            "save_every": 100_000,
            "model": {"path": str(folder / "start"), "max_length": RECIPE.max_length},
            "data": paths,
            "method": {"preset": "bt", "style_control": name == "style_control"},
            "optim": {
                "learning_rate": RECIPE.learning_rate,
                "pairs_per_step": RECIPE.pairs_per_step,
                "train_batch": RECIPE.pairs_per_step,
                "warmup_ratio": 0.1,
            },
        }
        manifest = train(parse_config(config, name))
        found[name] = measured(output, Path(paths["test"]), data.test, sides["test"])
        if manifest and manifest.method and manifest.method.options["style"]:
            style = manifest.method.options["style"]
            shift = style_differences([(adorned(pair.chosen), pair.chosen) for pair in data.test]).mean(axis=0)
            b = np.array(list(style["weights"].values())) / np.array(list(style["scales"].values()))
            found["recovered"] = float(b @ shift)
    return found


def main() -> None:
    """Runs the experiment and prints its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=4800)
    parser.add_argument("--effect", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(run(options.folder, options.pairs, options.effect, options.seed), indent=2))


if __name__ == "__main__":
    main()
