"""The plan that a dry run prints: steps, lengths, and estimates of memory and time, measured on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from marginrm.forward.module import RewardModule
from marginrm_training.config import TrainConfig
from marginrm_training.data.collate import PairCollator
from marginrm_training.data.splits import EncodedPair, Splits
from marginrm_training.method.losses import bradley_terry
from marginrm_training.run.activations import KeptBytes
from marginrm_training.run.distributed import ranks

_BARS = 8
_WIDTH = 30
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Measured:
    """One forward and backward pass over a typical batch, and the memory of the largest.

    Attributes:
        seconds_per_token: Seconds of forward and backward pass for each computed token.
        activations: Bytes that the largest batch keeps for its backward pass.
    """

    seconds_per_token: float
    activations: int


def plan(config: TrainConfig, splits: Splits, module: RewardModule) -> str:
    """Returns steps, a histogram of lengths, and estimates of memory and time."""
    optim = config.optim
    pairs = splits.train.pairs
    an_epoch = len(pairs) // (optim.train_batch * ranks())
    accumulated = optim.pairs_per_step // (optim.train_batch * ranks())
    steps = math.ceil(math.ceil(an_epoch / accumulated) * optim.epochs)
    lengths = [side.tokens for pair in pairs for side in (pair.chosen, pair.rejected)]
    computed = computed_tokens(pairs, optim.train_batch, module)
    measured = measure(config, pairs, module)
    minutes = measured.seconds_per_token * computed * optim.epochs / ranks() / 60
    weights = sum(weight.numel() for weight in module.parameters())
    taught = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    memory = 4 * weights + 12 * taught  # float32: weights; gradients and AdamW's two moments of what is trained
    return "\n".join(
        [
            f"steps: {steps:,} of {optim.pairs_per_step} pairs, {optim.train_batch} a forward pass, {ranks()} rank(s)",
            f"weights: {weights:,}, of which {taught:,} are trained",
            "tokens per response:",
            *histogram(lengths),
            f"tokens an epoch: {sum(lengths):,}; the forward pass computes {computed:,}",
            f"memory: {memory / _GIB:.2f} GiB for weights, gradients and AdamW",
            f"        {measured.activations / _GIB:.2f} GiB for activations of the longest batch (measured)",
            f"time: about {minutes:.1f} minutes for the forward and backward passes (measured on one batch)",
        ]
    )


def histogram(lengths: Sequence[int]) -> list[str]:
    """Returns bars of equal width from the shortest to the longest, with their counts."""
    counts, edges = np.histogram(lengths, bins=min(_BARS, max(lengths) - min(lengths) + 1))
    return [
        f"  {math.ceil(low):>7,} to {high:>7,.0f} {'#' * round(_WIDTH * count / counts.max()):<{_WIDTH}} {count:,}"
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def measure(config: TrainConfig, pairs: Sequence[EncodedPair], module: RewardModule) -> Measured:
    """Times a typical batch and weighs the longest one; the module's gradients are cleared afterwards."""
    size = config.optim.train_batch
    by_length = sorted(pairs, key=lambda pair: pair.chosen.tokens + pair.rejected.tokens)
    middle = max(0, (len(by_length) - size) // 2)
    activations = _kept_bytes(module, by_length[-size:], config)
    started = time.perf_counter()
    tokens = _pass(module, by_length[middle : middle + size], config)
    return Measured((time.perf_counter() - started) / tokens, activations)


def _pass(module: RewardModule, pairs: Sequence[EncodedPair], config: TrainConfig) -> int:
    """Runs forward and backward once and returns how many tokens were computed."""
    row = PairCollator(module)(pairs)["batch"].row.to(module.device)
    module.train()
    with torch.autocast(module.device.type, torch.bfloat16, enabled=config.model.dtype == "bfloat16"):
        rewards = module(row)
    bradley_terry(rewards[0::2] - rewards[1::2]).mean().backward()
    module.zero_grad(set_to_none=True)
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return row.tokens


def _kept_bytes(module: RewardModule, pairs: Sequence[EncodedPair], config: TrainConfig) -> int:
    """Returns the bytes that a forward pass keeps for the backward pass."""
    row = PairCollator(module)(pairs)["batch"].row.to(module.device)
    module.train()
    with (
        KeptBytes() as kept,
        torch.autocast(module.device.type, torch.bfloat16, enabled=config.model.dtype == "bfloat16"),
    ):
        rewards = module(row)
        total: int = kept.total
    del rewards
    return total


def computed_tokens(pairs: Sequence[EncodedPair], size: int, module: RewardModule) -> int:
    """Returns how many tokens the forward passes of one epoch compute: shared prefixes once, padding included."""
    groups = [[pair.chosen, pair.rejected] for pair in pairs]
    return sum(module.collate(groups[start : start + size]).tokens for start in range(0, len(groups), size))
