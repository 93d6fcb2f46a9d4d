"""The demo model's shape and optimiser."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DemoRecipe:
    """Hyper-parameters of the demo; docs/experiments.md has its accuracy.

    Attributes:
        vocabulary: Tokens of the BPE tokenizer, trained on the demo's own texts.
        hidden: Width; the feed-forward part is four times as wide.
        layers: Transformer layers.
        heads: Attention heads.
        max_length: Most tokens a sequence may have.
        learning_rate: Peak, AdamW.
        epochs: Passes over the training pairs.
        pairs_per_step: Pairs per optimiser step, equal to the reference batch.
        preset: Preset of the margin method.
    """

    vocabulary: int = 1024
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    max_length: int = 1024
    learning_rate: float = 1.5e-3
    epochs: float = 1.0
    pairs_per_step: int = 16
    preset: str = "soft_label"


RECIPE = DemoRecipe()
