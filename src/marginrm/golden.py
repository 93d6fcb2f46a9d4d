"""The self-test of a loaded model: the golden samples of its manifest, scored again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from marginrm.encoding import EncodedResponse, Encoder
from marginrm.errors import GoldenMismatchError
from marginrm.manifest import Manifest


def verify_golden(
    manifest: Manifest | None, encoder: Encoder, dtype: str, score: Callable[[Sequence[EncodedResponse]], list[float]]
) -> float | None:
    """Scores the golden samples of a manifest again.

    Args:
        manifest: The record of the checkpoint, if it has one.
        encoder: The encoder of the checkpoint.
        dtype: The dtype that `score` computes in; the manifest has a tolerance for each.
        score: Returns one reward for each response.

    Returns:
        The largest difference to the recorded rewards, or None if there are no samples.

    Raises:
        GoldenMismatchError: Token ids differ, or a reward by more than the manifest's tolerance for this dtype.
    """
    if not manifest or not manifest.golden:
        return None
    samples = manifest.golden
    encoded = [encoder.encode(sample.prompt, sample.response) for sample in samples]
    for index, (sample, found) in enumerate(zip(samples, encoded, strict=True)):
        if list(found.ids) != list(sample.ids):
            raise GoldenMismatchError(
                f"golden[{index}]: the tokenizer gives {len(found.ids)} token ids that differ from the "
                f"{len(sample.ids)} recorded in training. Was the tokenizer or its chat template replaced?"
            )
    rewards = score(encoded)
    differences = [abs(reward - sample.reward) for reward, sample in zip(rewards, samples, strict=True)]
    worst = max(range(len(differences)), key=lambda index: (math.isnan(differences[index]), differences[index]))
    tolerance = manifest.golden_tolerance.get(dtype, 0.0)
    if not differences[worst] <= tolerance:
        raise GoldenMismatchError(
            f"golden[{worst}]: reward {rewards[worst]:.6f}, recorded {samples[worst].reward:.6f}; {dtype} "
            f"may differ by {tolerance:g}. The weights differ from the trained ones, or this dtype is too coarse for "
            "them; try --dtype float32."
        )
    return differences[worst]
