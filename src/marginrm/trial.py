"""Work without meaning, as much as is wanted: to warm up with, and to measure."""

from __future__ import annotations

import random

from marginrm.encoding import EncodedResponse, Encoder

_LENGTH = 256  # tokens of a sequence


def trial_groups(encoder: Encoder, tokens: int) -> list[list[EncodedResponse]]:
    """Makes groups of one response each that share nothing, of tokens that the model knows.

    Args:
        encoder: The model's.
        tokens: Of all groups together; rounded down to whole sequences, one at least.
    """
    pattern = encoder.encode("Are you there?", "Yes, I am.", "prompt_left")
    length = min(encoder.max_length, _LENGTH)
    times = -(-length // len(pattern.ids))
    ids = (pattern.ids * times)[:length]
    types = None if pattern.type_ids is None else (pattern.type_ids * times)[:length]
    generator = random.Random(0)  # noqa: S311 - nothing secret
    return [[EncodedResponse(tuple(generator.sample(ids, length)), types)] for _ in range(max(tokens // length, 1))]
