"""Eligibility: are packed rows exact for a model? Static obstacles first, then a probe against its padded forward."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from marginrm.attention.gathered import GatheredLayout
from marginrm.attention.interface import ATTENTION_NAME
from marginrm.attention.layout import UnsupportedAttentionError
from marginrm.errors import HeadError
from marginrm.forward.batch import PackedBatch, pad
from marginrm.forward.module import RewardModule, evaluating
from marginrm.forward.pooling import Pooling, keep_head_in_float32, pooling_of
from marginrm.forward.self_check import difference, groups_for, tolerance

_EXACT_LAYERS = {"full_attention", "sliding_attention"}
_ROPE_OF_BATCH = {"dynamic", "longrope"}
_PROBE_TOKENS = 12


def build_module(classifier: PreTrainedModel, *, max_length: int) -> RewardModule:
    """Builds the forward pass of a classifier on packed rows if a probe shows them to be exact, else on padded ones.

    Args:
        classifier: A transformers sequence-classification model (or a PEFT wrapper of one) with one label. Its head is
            cast to float32, and its attention implementation is set.
        max_length: The longest sequence that it will be given, in tokens.

    Raises:
        HeadError: The classifier does not give exactly one value per sequence.
    """
    unwrap = getattr(classifier, "get_base_model", None)
    base: PreTrainedModel = unwrap() if unwrap else classifier
    if base.config.num_labels != 1:
        raise HeadError(
            f"The model's head gives {base.config.num_labels} values per sequence; a reward model gives 1 "
            "(num_labels = 1). Is this a classifier, or a checkpoint saved without its reward head?"
        )
    pooling = pooling_of(base)
    keep_head_in_float32(base, pooling)
    obstacle = _static_obstacle(base, pooling) or _unreplaceable_attention(base)
    if obstacle is None:
        sharing = "prefixes shared" if pooling and pooling.reads == "last" else "an encoder, nothing to share"
        module = RewardModule(
            classifier,
            max_length=max_length,
            pooling=pooling,
            forward_path="packed",
            path_reason=f"packed rows reproduce the padded forward ({sharing})",
        )
        obstacle = _probe(module)
        if obstacle is None:
            return module
    base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")  # noqa: SLF001 - no public name for it
    return RewardModule(
        classifier, max_length=max_length, pooling=pooling, forward_path="padded", path_reason=f"padded: {obstacle}"
    )


def _static_obstacle(base: PreTrainedModel, pooling: Pooling | None) -> str | None:
    """Returns what in class or configuration rules out packed rows."""
    if pooling is None:
        return f"the head of {type(base).__name__} is not one that marginrm can pool by position"
    unknown = set(getattr(base.config, "layer_types", None) or ()) - _EXACT_LAYERS
    if unknown:
        return f"layers of type {', '.join(sorted(unknown))}"
    rope = getattr(base.config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _ROPE_OF_BATCH:
        return f"{rope['rope_type']} RoPE depends on the longest sequence of the batch"
    return None


def _unreplaceable_attention(base: PreTrainedModel) -> str | None:
    """Sets the attention function for packed rows; returns why it cannot be set."""
    try:
        base.set_attn_implementation(ATTENTION_NAME)
    except (ValueError, NotImplementedError) as error:
        return f"its attention cannot be replaced ({type(error).__name__})"
    return None


@torch.no_grad()
def _probe(module: RewardModule) -> str | None:
    """Compares packed with padded rewards on a few random sequences; returns what speaks against packing."""
    if next(module.parameters()).is_meta:
        return None
    groups = groups_for(module, _PROBE_TOKENS)
    batch = module.collate(groups).to(module.device)
    assert isinstance(batch, PackedBatch)
    with evaluating(module):
        padded = module(pad(groups, pad_token_id=module.base.config.pad_token_id).to(module.device))
        try:
            packed = module(batch)
        except UnsupportedAttentionError as error:
            return str(error)
    found = difference(packed, padded)
    if not found <= tolerance(module):
        return f"packed and padded rewards differ by {found:.2g} in a probe"
    return _silent_window(module, batch)


def _silent_window(module: RewardModule, batch: PackedBatch) -> str | None:
    """Returns an obstacle if the configuration has a window that no layer passed to its attention function."""
    window = _sliding_window(module.base.config)
    assert isinstance(batch.layout, GatheredLayout)
    seen = {key for call in batch.layout.calls for key, _ in call.masks}
    if window is not None and window < module.max_length and seen == {None}:
        return f"a sliding window of {window:,} tokens that its attention does not announce"
    return None


def _sliding_window(config: object) -> int | None:
    window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and getattr(config, "use_sliding_window", True) else None
