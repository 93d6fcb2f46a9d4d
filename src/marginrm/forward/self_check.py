"""Self-checks: probe batches, the difference of two sets of rewards, and the tolerance for each dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from marginrm.encoding import EncodedResponse, Encoder
from marginrm.forward.module import RewardModule, evaluating
from marginrm.forward.own_forward import pad_token_of, vocabulary_of

# How far two computations of one reward may differ, relative to the larger of 1 and the reward, by the dtype of the
# matrix products. A token that attends to one token too many or too few is off by far more than rounding.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
_OTHER_DTYPES = 0.1
_PROBE_TOKENS = (12, 40)


_SENTENCE = "Why does bread rise, and how long should the dough rest before it goes into a hot oven? "
_PROBES = (
    ("Why is the sky blue?", ("Air scatters blue light most.", "No.")),
    (_SENTENCE * 8, ("Yeast eats sugar and gives off gas.", "It does not rise.", "The dough holds the bubbles. " * 8)),
    ("How do I boil an egg?", ("Put it into boiling water for eight minutes, then cool it. " * 6,)),
)


def conversations(encoder: Encoder) -> list[list[EncodedResponse]]:
    """Returns one conversation of each shape: short, long, and several responses to one prompt.

    Args:
        encoder: The model's encoder; what it refuses is left out.
    """
    groups = []
    for prompt, responses in _PROBES:
        encoded = encoder.encode_group(prompt, responses, "prompt_left")
        groups.append([one for one in encoded if isinstance(one, EncodedResponse)])
    return [group for group in groups if group]


def step_conversations(encoder: Encoder) -> list[list[EncodedResponse]]:
    """Returns a conversation of several steps for a process reward model, and none for other models."""
    if encoder.policy.steps is None:
        return []
    responses = (["2 + 3 is 5.", "5 + 4 is 9."], ["2 + 3 is 5.", "So it is 6."])
    encoded = encoder.encode_group("What is 2 + 3 + 4?", responses, "prompt_left")
    return [[one for one in encoded if isinstance(one, EncodedResponse)]]


def probe_groups(
    vocabulary: int, longest: int, *, pad: int | None = None, end: int | None = None
) -> list[list[EncodedResponse]]:
    """Makes two groups with a shared prefix and one without, of random tokens.

    Args:
        vocabulary: Number of token ids that the model knows.
        longest: Tokens of the longest sequence.
        pad: The padding token, which is left out.
        end: The token that ends each sequence and stands nowhere else, as some encoders pool at it; None for any.
    """
    generator = torch.Generator().manual_seed(0)
    known = torch.tensor([one for one in range(min(1, vocabulary - 1), vocabulary) if one not in {pad, end}])

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(known[torch.randint(len(known), (count,), generator=generator)].tolist())

    def response(prefix: tuple[int, ...], count: int) -> EncodedResponse:
        return EncodedResponse(prefix + (tokens(count) if end is None else (*tokens(count - 1), end)))

    prefix = tokens(max(longest // 2, 1))
    shared = [response(prefix, max(count, 1)) for count in (longest // 2, longest // 4, 1)]
    return [shared, [response((), longest)], [response(prefix[:2], 1) for _ in range(2)]]


def groups_for(module: RewardModule, longest: int) -> list[list[EncodedResponse]]:
    """Returns `probe_groups` of tokens that a module knows, of at most as many as it takes."""
    longest = min(longest, module.max_length, module.length_boundary or longest)
    return probe_groups(vocabulary_of(module.base), longest, pad=pad_token_of(module.base))


def probe_rewards(module: RewardModule) -> Tensor:
    """Returns the rewards of probes of two sizes, in one forward pass: a large model reads all its weights in each."""
    groups = [group for size in _PROBE_TOKENS for group in groups_for(module, size)]
    with torch.inference_mode(), evaluating(module):
        rewards: Tensor = module(module.collate(groups).to(module.device))
        return rewards


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the larger of 1 and the expected value."""
    return float(((found - expected).abs() / expected.abs().clamp(min=1)).max())


def tolerance(module: RewardModule) -> float:
    """Returns how far two computations may differ in the dtype of the module's products, autocast's if that is on."""
    kind = module.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else module.dtype
    return TOLERANCE.get(str(dtype).removeprefix("torch."), _OTHER_DTYPES)
