"""The models that are served while the server is tried: the demo's shape, weights drawn at random."""

from __future__ import annotations

import shutil
from pathlib import Path

from marginrm import RewardModel
from marginrm_training.demo.build import write_demo
from marginrm_training.demo.model import build_model
from marginrm_training.demo.recipe import RECIPE

WORK = Path("runs/reliability")
# Few texts are asked again and again: it is the model that is to be tried, and not the memory for its rewards.
COMPUTED = ("--dtype", "float32", "--reward-cache-mib", "0")


def model_paths() -> tuple[Path, Path]:
    """Writes two checkpoints, once, that differ in nothing but their weights, and returns their folders."""
    first, second = WORK / "model" / "start", WORK / "model" / "other"
    if not (first / "tokenizer.json").is_file():
        write_demo(WORK / "model")
    if not (second / "tokenizer.json").is_file():
        shutil.copytree(first, second, dirs_exist_ok=True)
        from transformers import PreTrainedTokenizerFast

        build_model(PreTrainedTokenizerFast.from_pretrained(first), RECIPE, 1).save_pretrained(second)
    return first, second


def reference(path: Path) -> RewardModel:
    """Loads what the server's rewards are compared with."""
    return RewardModel.from_pretrained(path, dtype="float32")
