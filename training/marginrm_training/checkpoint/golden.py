"""Golden samples: texts whose token ids and rewards every loader of the checkpoint must reproduce."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from marginrm.forward.self_check import TOLERANCE
from marginrm.manifest import GoldenSample
from marginrm_training.data.splits import EncodedPair
from marginrm_training.evaluation.pairs import PairRewards

GOLDEN_PAIRS = 4


def golden_samples(rewards: PairRewards, pairs: Sequence[EncodedPair]) -> list[GoldenSample]:
    """Returns the responses of the first `GOLDEN_PAIRS` pairs with their token ids and rewards."""
    samples = []
    for pair, chosen, rejected in zip(pairs[:GOLDEN_PAIRS], rewards.chosen, rewards.rejected, strict=False):
        prompt = pair.pair.prompt
        text = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
        for response, encoded, reward in (
            (pair.pair.chosen, pair.chosen, chosen),
            (pair.pair.rejected, pair.rejected, rejected),
        ):
            if not encoded.truncated:  # a server refuses texts that are too long, unless a request says otherwise
                samples.append(
                    GoldenSample(prompt=text, response=response, ids=list(encoded.ids), reward=float(reward))
                )
    return samples


def tolerances(rewards: PairRewards) -> dict[str, float]:
    """Returns the largest difference that a golden reward may show, by dtype.

    It grows with the rewards. Rounding differs between processors; a wrong tokenizer, template or weight file changes
    rewards by far more.
    """
    largest = max(1.0, float(np.abs(np.concatenate([rewards.chosen, rewards.rejected])).max()))
    return {dtype: share * largest for dtype, share in TOLERANCE.items()}
