"""Chooses a classifier's forward path by a probe: the first one whose rewards are those of the classifier itself.

The truth is the classifier's own forward with transformers' eager attention on each conversation alone. Held against it
are our rewards of the same conversations in one batch: on packed rows, on padded batches, on padded batches through the
classifier's own forward, and through that one conversation at a time. Whatever a path raises means the next path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from marginrm.attention.interface import ATTENTION_NAME
from marginrm.attention.layout import AttentionLayout, AttentionOptions, KeysAndValues
from marginrm.encoding import Architecture, EncodedGroup, EncodedResponse
from marginrm.errors import HeadError, ModelError
from marginrm.forward.batch import Batch, PackedBatch, PaddedBatch, SplitBatch, pad
from marginrm.forward.module import RewardModule, evaluating
from marginrm.forward.own_forward import (
    end_token_of,
    is_own_code,
    on_meta,
    own_rewards,
    pad_token_of,
    vocabulary_of,
    without_padding_token,
)
from marginrm.forward.pooling import Pooling, head_in_float32, poolings_of
from marginrm.forward.rope import forget_lengths, length_boundary
from marginrm.forward.self_check import difference, probe_groups, tolerance
from marginrm.steps import ForwardPath

_EXACT_LAYERS = {"full_attention", "sliding_attention"}
_PROBE_TOKENS = (12, 160)
_AGREEMENT = 1e-4  # to which float32 rewards agree with the model's own; rounding of quantised activations exceeds it
_PLACES = {"packed": "packed", "padded": "padded", "one_at_a_time": "one at a time"}


@dataclass(frozen=True, slots=True)
class _Candidate:
    path: ForwardPath
    pooling: Pooling | None
    attention: str


def build_module(
    classifier: PreTrainedModel,
    *,
    max_length: int,
    architecture: Architecture | None = None,
    probe: Sequence[EncodedGroup] = (),
) -> RewardModule:
    """Builds the forward pass of a classifier on the best path that reproduces the classifier's own forward.

    Args:
        classifier: A transformers sequence-classification model, a PEFT wrapper of one, or a class of the checkpoint's own,
            with one value per sequence. Its attention implementation is set; a head that is pooled is cast to float32.
        max_length: The longest sequence that it will be given, in tokens.
        architecture: If it is known already; by default a classifier with a `score` is taken for a decoder.
        probe: Conversations to try (`self_check.conversations`); random tokens by default.

    Raises:
        HeadError: The classifier does not give exactly one value per sequence.
        ModelError: No path reproduces the classifier's own forward; the message says what was tried.
    """
    unwrap = getattr(classifier, "get_base_model", None)
    base: PreTrainedModel = unwrap() if unwrap else classifier
    forget_lengths(base)
    if on_meta(base):
        return _unprobed(classifier, base, max_length, architecture)
    groups = probe or _random_groups(base, max_length)
    truth = _truth(classifier, base, groups)
    tried: list[tuple[_Candidate, str]] = []
    for candidate in _candidates(base, architecture):
        reason = _obstacle(candidate, base)
        if reason is None:
            undo = head_in_float32(base, candidate.pooling) if candidate.pooling else lambda: None
            module = _module(classifier, candidate, max_length, architecture, tried)
            reason = _differs(module, groups, truth)
            if reason is None:
                return module
            undo()
        tried.append((candidate, reason))
    shown = "; ".join(dict.fromkeys(f"{_PLACES[candidate.path]}: {reason}" for candidate, reason in tried))
    raise ModelError(f"No forward path gives the rewards of {type(base).__name__}'s own forward. {shown}.")


def _unprobed(
    classifier: PreTrainedModel, base: PreTrainedModel, max_length: int, architecture: Architecture | None
) -> RewardModule:
    """Builds the module of a classifier whose weights are not in memory yet: on the first path without an obstacle."""
    if base.config.num_labels != 1:
        raise HeadError(f"The model's head gives {base.config.num_labels} values per sequence; a reward model gives 1.")
    for candidate in _candidates(base, architecture):
        if _obstacle(candidate, base) is None:
            if candidate.pooling:
                head_in_float32(base, candidate.pooling)
            return _module(classifier, candidate, max_length, architecture, [])
    raise ModelError(f"{type(base).__name__} has no attention implementation.")


def _candidates(base: PreTrainedModel, architecture: Architecture | None) -> Iterator[_Candidate]:
    poolings = poolings_of(base, architecture)
    for pooling in poolings:
        yield _Candidate("packed", pooling, ATTENTION_NAME)
    # SDPA ignores soft-capping.
    plain = getattr(base.config.get_text_config(), "attn_logit_softcapping", None) is None
    implementations = ("sdpa", "eager") if plain and getattr(base, "_supports_sdpa", False) else ("eager",)
    for implementation in implementations:
        for pooling in poolings:
            yield _Candidate("padded", pooling, implementation)
        yield _Candidate("padded", None, implementation)
    yield _Candidate("one_at_a_time", None, "eager")


def _module(
    classifier: PreTrainedModel,
    candidate: _Candidate,
    max_length: int,
    architecture: Architecture | None,
    tried: Sequence[tuple[_Candidate, str]],
) -> RewardModule:
    own = "" if candidate.pooling else " by the model's own forward"
    if candidate.path == "packed":
        assert candidate.pooling is not None
        shared = "prefixes shared" if candidate.pooling.reads == "last" else "an encoder, nothing to share"
        reason = f"packed rows reproduce the model's own forward ({shared})"
    else:
        why = {_PLACES[one.path]: text for one, text in reversed(tried) if one.path != candidate.path}
        reasons = "; ".join(f"not {path}: {text}" for path, text in sorted(why.items()))
        reason = f"{_PLACES[candidate.path]}{own}; {reasons or 'not packed: its head is read by its own forward only'}"
    return RewardModule(
        classifier,
        max_length=max_length,
        pooling=candidate.pooling,
        architecture=architecture,
        forward_path=candidate.path,
        path_reason=reason,
        length_boundary=length_boundary(classifier.config, max_length),
    )


def _obstacle(candidate: _Candidate, base: PreTrainedModel) -> str | None:
    """Sets a candidate's attention; returns what rules the candidate out without a probe."""
    config = base.config.get_text_config()
    if candidate.path == "packed":
        unknown = set(getattr(config, "layer_types", None) or ()) - _EXACT_LAYERS
        if unknown:
            return f"layers of type {', '.join(sorted(unknown))}"
    if not _set_attention(base, candidate.attention) and candidate.path == "packed":
        return "its attention does not go through transformers' AttentionInterface"
    return None


def _set_attention(base: PreTrainedModel, name: str) -> bool:
    """Sets the attention implementation, if the model lets it be set; says if it did."""
    settable = getattr(
        base, "_can_set_attn_implementation", None
    )  # private; without it, set_attn_implementation decides
    if settable is not None and not settable():
        return False
    try:
        base.set_attn_implementation(name)
    except Exception:  # noqa: BLE001 - own code raises errors of any class
        return False
    return True


@torch.no_grad()
def _truth(classifier: PreTrainedModel, base: PreTrainedModel, groups: Sequence[EncodedGroup]) -> Tensor:
    """Returns the values of the classifier's own forward, one conversation at a time, [values].

    Raises:
        HeadError: The classifier does not give exactly one value per sequence.
        ModelError: Its own forward fails.
    """
    _set_attention(base, "eager")
    pad_token = pad_token_of(base)
    ends_in_padding = any(
        sequence.array[-1] == pad_token
        for group in groups
        for response in group
        for sequence in _ended_where_read(response)
    )
    device = next(base.parameters()).device
    hidden = ends_in_padding and not is_own_code(base)
    try:
        with evaluating(classifier), without_padding_token(base) if hidden else nullcontext():
            return torch.cat(
                [
                    own_rewards(classifier, pad([[sequence]], pad_token_id=None).to(device))
                    for group in groups
                    for response in group
                    for sequence in _ended_where_read(response)
                ]
            )
    except HeadError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{type(base).__name__}'s own forward fails on a conversation: {type(error).__name__}: {reason}"
        ) from error


@torch.no_grad()
def _differs(module: RewardModule, groups: Sequence[EncodedGroup], truth: Tensor) -> str | None:
    """Returns what speaks against a path: an error, or rewards of all conversations together that are not the truth."""
    recorder = _WindowRecorder()
    try:
        with evaluating(module):
            found = module(recorder.around(module.collate(groups).to(module.device)))
    except Exception as error:  # noqa: BLE001 - a model's code raises errors of any class, and there is another path
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    same = found.isnan() & truth.isnan()  # a model that gives NaN gives it on every path
    worst = difference(torch.where(same, 0, found), torch.where(same, 0, truth))
    module.probe_difference = worst
    if not worst <= min(tolerance(module), _AGREEMENT if module.dtype == torch.float32 else math.inf):
        return f"rewards differ by {worst:.2g} from the model's own in a probe"
    return _silent_window(module, recorder) if module.forward_path == "packed" else None


def _ended_where_read(response: EncodedResponse) -> list[EncodedResponse]:
    """Returns the sequences whose last tokens are those that values are read at; in a decoder, later ones change nothing."""
    if response.read_at is None:
        return [response]
    return [EncodedResponse(response.array[: at + 1]) for at in response.read_at]


class _WindowRecorder:
    """Notes which windows layers pass to their attention."""

    def __init__(self) -> None:
        self.windows: set[int | None] = set()

    def around(self, batch: Batch) -> Batch:
        """Returns a batch whose packed rows note it."""
        if isinstance(batch, SplitBatch):
            return replace(batch, parts=tuple(map(self._around, batch.parts)))
        return self._around(batch)

    def _around(self, batch: PackedBatch | PaddedBatch) -> PackedBatch | PaddedBatch:
        return replace(batch, layout=_Noting(batch.layout, self.windows)) if isinstance(batch, PackedBatch) else batch


@dataclass(frozen=True, slots=True)
class _Noting:
    """A layout that notes windows, around the layout that computes."""

    layout: AttentionLayout
    windows: set[int | None]

    def to(self, device: torch.device) -> _Noting:
        return replace(self, layout=self.layout.to(device))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        cached: Sequence[KeysAndValues] = (),
    ) -> Tensor:
        self.windows.add(options.window)
        return self.layout.attend(query, key, value, options, cached)


def _silent_window(module: RewardModule, recorder: _WindowRecorder) -> str | None:
    """Returns an obstacle if the configuration has a window that no layer passed to its attention function."""
    config = module.base.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    used = isinstance(window, int) and getattr(config, "use_sliding_window", True)
    if used and (types is None or "sliding_attention" in types) and recorder.windows == {None}:
        return f"a sliding window of {window:,} tokens that its attention does not announce"
    return None


def _random_groups(base: PreTrainedModel, max_length: int) -> list[EncodedGroup]:
    vocabulary, pad_token, end = vocabulary_of(base), pad_token_of(base), end_token_of(base)
    short, long = (
        probe_groups(vocabulary, min(max_length, tokens), pad=pad_token, end=end) for tokens in _PROBE_TOKENS
    )
    return [*short, long[1]]
