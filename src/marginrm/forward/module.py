"""The forward pass that training and serving share: rows of tokens in, one float32 reward per response out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from marginrm.attention.blocked import block_layout
from marginrm.attention.flex import interval_layout
from marginrm.attention.gathered import (
    SPLIT_FROM,
    AttentionLayout,
    UnsupportedAttentionError,
    attention_layout,
    unsplit_layout,
)
from marginrm.attention.interface import ATTENTION_NAME
from marginrm.attention.layout import LayoutFn
from marginrm.encoding import Architecture, EncodedResponse
from marginrm.errors import HeadError
from marginrm.forward.batch import EncodedGroup, PackedRow, PaddedRows, pack, pad
from marginrm.steps import ForwardPath

# How far packed and padded rewards of the load-time probe may lie apart, relative to the larger of 1 and the reward.
# Packing errors (a token that sees too much or too little) are orders of magnitude above rounding in float32.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
_EXACT_LAYERS = {"full_attention", "sliding_attention"}
_ROPE_OF_BATCH = {"dynamic", "longrope"}


class RewardModule(nn.Module):
    """A sequence classifier with one label, run on packed rows wherever that is exact.

    The head and everything after the backbone computes in float32, also under autocast: bfloat16 heads tie.

    Args:
        classifier: A transformers sequence-classification model (or a PEFT wrapper of one) with one label.
        max_length: The longest sequence that it will be given, in tokens.

    Attributes:
        classifier: As given; save it with `classifier.save_pretrained`.
        architecture: `decoder` (reward at the last token) or `encoder` (reward at the first).
        forward_path: `packed`, or `padded` for models that packing cannot represent exactly.
        max_length: As given.
        flex_on: The type of device on which FlexAttention goes over packed rows (`attention_choice`), or None.
        products_on: The type of device on which attention is computed by matrix products while no gradients are wanted
            (`attention_choice`), or None.
        attention_reason: Why the one or the other, in words; empty where neither was tried.
        weights_reason: What was done to the weights for scoring, in words (`packed_weights`); empty for nothing.
        short_last_layer: Whether the last layer is computed only where rewards are read (`last_layer`).
        last_layer_reason: Why it is so, in words; empty where it was not tried.
        tile: Tokens of which rows are whole multiples, where rewards are the same to the bit in any company
            (`deterministic`); else None.

    Raises:
        HeadError: The classifier does not give exactly one value per sequence.
    """

    def __init__(self, classifier: PreTrainedModel, *, max_length: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.train(classifier.training)
        if self.base.config.num_labels != 1:
            raise HeadError(
                f"The model's head gives {self.base.config.num_labels} values per sequence; a reward model gives 1 "
                "(num_labels = 1). Is this a classifier, or a checkpoint saved without its reward head?"
            )
        self._pool = _pooling_of(self.base)
        self.architecture: Architecture = "decoder" if self._pool is _last_token_reward else "encoder"
        # By these layers FSDP shards; accelerate looks for them here.
        self._no_split_modules = self.base._no_split_modules  # noqa: SLF001 - transformers has no public name for it
        for part in _head_modules(self.base):
            part.float().register_forward_pre_hook(_in_float32)
        self.forward_path: ForwardPath
        self.max_length = max_length
        self.flex_on: str | None = None
        self.products_on: str | None = None
        self.attention_reason = ""
        self.weights_reason = ""
        self.short_last_layer = False
        self.last_layer_reason = ""
        self.tile: int | None = None
        self._can_split = True
        self.forward_path, self._path_reason = self._choose_path(max_length)

    @property
    def base(self) -> PreTrainedModel:
        """The classifier itself, without a PEFT wrapper around it."""
        unwrap = getattr(self.classifier, "get_base_model", None)
        return cast("PreTrainedModel", unwrap()) if unwrap else self.classifier

    @property
    def backbone(self) -> nn.Module:
        """The classifier without its head."""
        return cast("nn.Module", getattr(self.base, self.base.base_model_prefix))

    @property
    def forward_reason(self) -> str:
        """Why that path, and for packed rows that attention and what else was found faster here, in words."""
        reasons = self._path_reason, self.attention_reason, self.last_layer_reason, self.weights_reason
        return "; ".join(filter(None, reasons))

    @property
    def reads_every_token(self) -> bool:
        """Whether a reward is read at all of its tokens, and not at the last or the first alone."""
        return self._pool is _modernbert_reward and self.base.config.classifier_pooling != "cls"

    @property
    def config(self) -> object:
        """The classifier's configuration, where trainers look for it."""
        return self.base.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's dtype; the head is float32 whatever it is."""
        return next(self.backbone.parameters()).dtype

    def collate(self, groups: Sequence[EncodedGroup]) -> PackedRow | PaddedRows:
        """Lays groups out for this model's exact path, on the CPU."""
        if self.forward_path == "packed":
            return pack(groups, causal=self.architecture == "decoder", layout=self._layout)
        return pad(groups, pad_token_id=self.base.config.pad_token_id)

    def forward(self, row: PackedRow | PaddedRows) -> Tensor:
        """Computes rewards.

        Args:
            row: What `collate` made, on the model's device.

        Returns:
            Float32 rewards, [responses], in the order of the groups and of the responses in them; differentiable.
        """
        if isinstance(row, PackedRow):
            return self._forward_packed(row)
        return self._forward_padded(row)

    @property
    def _layout(self) -> LayoutFn:
        """How attention goes over the rows made now."""
        if self.tile:
            return block_layout
        if self._flexes:
            return interval_layout
        split_from = SPLIT_FROM if self._splits else None
        return partial(attention_layout, split_from=split_from, products=self.products_on == self.device.type)

    @property
    def _splits(self) -> bool:
        """Whether long prefixes are computed apart: only CPU kernels tell the log-sum-exp, and those know no dropout."""
        return self._can_split and self.device.type == "cpu" and not (self.training and _attention_dropout(self.base))

    @property
    def _flexes(self) -> bool:
        """Whether FlexAttention is for the rows made now: it knows no dropout, and on CPUs no gradients."""
        trains_without = self.training and (self.device.type == "cpu" or _attention_dropout(self.base) > 0)
        return self.flex_on == self.device.type and not trains_without

    def _forward_packed(self, row: PackedRow) -> Tensor:
        inputs: dict[str, Any] = {} if row.type_ids is None else {"token_type_ids": row.type_ids}
        if self.architecture == "decoder":
            inputs["use_cache"] = False
        if self.short_last_layer:
            inputs["read_at"] = row.last if self.architecture == "decoder" else row.first
        hidden = self.backbone(
            input_ids=row.ids,
            position_ids=row.position_ids,
            # transformers passes a 4D mask on as it is, so it builds no [tokens, tokens] mask that nobody reads.
            attention_mask=torch.empty(1, 1, 1, 1, device=row.ids.device),
            packed_row=row,
            **inputs,
        ).last_hidden_state[0]
        if self.short_last_layer:
            places = torch.arange(row.rewards, device=hidden.device)
            return self._reward(hidden, _Ends(places, places, None))
        return self._reward(hidden, _Ends(row.first, row.last, row.owner))

    def _forward_padded(self, rows: PaddedRows) -> Tensor:
        inputs: dict[str, Any] = {} if rows.type_ids is None else {"token_type_ids": rows.type_ids}
        if self._pool is None:
            logits = self.base(input_ids=rows.ids, attention_mask=rows.mask, **inputs).logits
            return cast("Tensor", logits.float()[:, 0])
        if self.architecture == "decoder":
            inputs["use_cache"] = False
        hidden = self.backbone(input_ids=rows.ids, attention_mask=rows.mask, **inputs).last_hidden_state
        responses, longest = rows.ids.shape
        first = torch.arange(responses, device=hidden.device) * longest
        real = rows.mask.bool()
        owner = torch.arange(responses, device=hidden.device).repeat_interleave(rows.lengths)
        if self.architecture == "decoder":
            return self._reward(hidden.flatten(0, 1), _Ends(first, first + rows.lengths - 1, None))
        starts = rows.lengths.cumsum(0) - rows.lengths
        return self._reward(hidden[real], _Ends(starts, starts + rows.lengths - 1, owner))

    def _reward(self, hidden: Tensor, ends: _Ends) -> Tensor:
        assert self._pool is not None  # _choose_path sends models without one to their own forward
        with torch.autocast(hidden.device.type, enabled=False):
            return self._pool(self.base, hidden, ends)

    def _choose_path(self, max_length: int) -> tuple[ForwardPath, str]:
        """Decides by what the configuration says and by a probe whether packed rows are exact for this model."""
        reason = self._static_obstacle()
        if reason is None:
            try:
                self.base.set_attn_implementation(ATTENTION_NAME)
            except (ValueError, NotImplementedError) as error:
                reason = f"its attention is not replaceable ({type(error).__name__})"
        if reason is None:
            reason = self._probe(max_length)
        if reason is None:
            sharing = "prefixes shared" if self.architecture == "decoder" else "an encoder, nothing to share"
            return "packed", f"packed rows reproduce the padded forward ({sharing})"
        self.base.set_attn_implementation("sdpa" if self.base._supports_sdpa else "eager")  # noqa: SLF001
        return "padded", f"padded: {reason}"

    def _static_obstacle(self) -> str | None:
        config = self.base.config
        if self._pool is None:
            return f"the head of {type(self.base).__name__} is not one that marginrm can pool by position"
        unknown = set(getattr(config, "layer_types", None) or ()) - _EXACT_LAYERS
        if unknown:
            return f"layers of type {', '.join(sorted(unknown))}"
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in _ROPE_OF_BATCH:
            return f"{rope['rope_type']} RoPE depends on the longest sequence of the batch"
        return None

    @torch.no_grad()
    def _probe(self, max_length: int) -> str | None:
        """Compares packed with padded rewards on a few random sequences; returns what speaks against packing."""
        if next(self.parameters()).is_meta:
            return None
        groups = probe_groups(self.base.config.vocab_size, min(max_length, 12))
        training = self.training
        self.eval()
        try:
            padded = self._forward_padded(pad(groups, pad_token_id=self.base.config.pad_token_id).to(self.device))
            row = pack(groups, causal=self.architecture == "decoder", layout=unsplit_layout).to(self.device)
            difference = probe_difference(self._forward_packed(row), padded)
            self._can_split = self._splits and self._probe_split(groups, padded)
        except UnsupportedAttentionError as error:
            return str(error)
        finally:
            self.train(training)
        if not difference <= probe_tolerance(self):
            return f"packed and padded rewards differ by {difference:.2g} in a probe"
        window = _sliding_window(self.base.config)
        assert isinstance(row.layout, AttentionLayout)
        seen = {key for call in row.layout.calls for key, _ in call.masks}
        if window is not None and window < max_length and seen == {None}:
            return f"a sliding window of {window:,} tokens that its attention does not announce"
        return None

    def _probe_split(self, groups: Sequence[EncodedGroup], padded: Tensor) -> bool:
        """Returns whether the model's attention can be computed for a shared prefix and the rest apart."""
        try:
            causal = self.architecture == "decoder"
            row = pack(groups, causal=causal, layout=partial(attention_layout, split_from=2))
            return probe_difference(self._forward_packed(row), padded) <= probe_tolerance(self)
        except UnsupportedAttentionError:
            return False


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode for a while; each of its parts then goes back to its own mode."""
    if not module.training:
        yield
        return
    parts = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in parts:
            part.training = True


class _Ends(NamedTuple):
    """Where responses lie among hidden states: first and last token, [responses]; owner of each token, [tokens]."""

    first: Tensor
    last: Tensor
    owner: Tensor | None


PoolingFn = Callable[[Any, Tensor, _Ends], Tensor]


def _pooling_of(model: PreTrainedModel) -> PoolingFn | None:
    """Returns how this family turns hidden states into rewards; None if only its own forward knows."""
    if isinstance(getattr(model, "score", None), nn.Module):
        return _last_token_reward
    if model.config.model_type == "bert":
        return _bert_reward
    if model.config.model_type == "modernbert":
        return _modernbert_reward
    return None


def _in_float32(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(argument.float() for argument in args)


def _head_modules(model: PreTrainedModel) -> list[nn.Module]:
    paths = {"bert": ("bert.pooler", "classifier"), "modernbert": ("head", "classifier")}
    names = paths.get(model.config.model_type, ("score",))
    found = dict(model.named_modules())
    return [found[name] for name in names if name in found]


def _last_token_reward(model: Any, hidden: Tensor, ends: _Ends) -> Tensor:
    return cast("Tensor", model.score(hidden[ends.last])[:, 0])


def _bert_reward(model: Any, hidden: Tensor, ends: _Ends) -> Tensor:
    pooled = model.bert.pooler(hidden[ends.first][:, None])
    return cast("Tensor", model.classifier(model.dropout(pooled))[:, 0])


def _modernbert_reward(model: Any, hidden: Tensor, ends: _Ends) -> Tensor:
    if model.config.classifier_pooling == "cls":
        pooled = hidden[ends.first]
    else:
        assert ends.owner is not None  # encoders are never packed with sharing
        sums = torch.zeros(len(ends.first), hidden.shape[1], device=hidden.device)
        pooled = sums.index_add(0, ends.owner, hidden.float()) / (ends.last - ends.first + 1)[:, None]
    return cast("Tensor", model.classifier(model.drop(model.head(pooled)))[:, 0])


def probe_groups(vocabulary: int, longest: int) -> list[list[EncodedResponse]]:
    """Makes two groups with a shared prefix and one without, of random tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(min(1, vocabulary - 1), vocabulary, (count,), generator=generator).tolist())

    prefix = tokens(max(longest // 2, 1))
    shared = [EncodedResponse(prefix + tokens(max(count, 1))) for count in (longest // 2, longest // 4, 1)]
    return [shared, [EncodedResponse(tokens(longest))], [EncodedResponse(prefix[:2] + tokens(1)) for _ in range(2)]]


def probe_rewards(module: RewardModule, longest: int) -> Tensor:
    """Returns the rewards of probes of two sizes, so that what is compiled for them serves every later size.

    Args:
        module: In evaluation mode.
        longest: The most tokens that a sequence may have.
    """
    vocabulary = module.base.config.vocab_size
    with torch.inference_mode():
        rows = (module.collate(probe_groups(vocabulary, min(longest, size))) for size in (12, 40))
        return torch.cat([module(row.to(module.device)) for row in rows])


def probe_difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the larger of 1 and the reward."""
    return float(((found - expected).abs() / expected.abs().clamp(min=1)).max())


def probe_tolerance(module: RewardModule) -> float:
    """Returns how far rewards of a probe may lie apart in the dtype of the module's products, autocast's if that is on."""
    kind = module.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else module.dtype
    return _PROBE_TOLERANCE.get(dtype, 0.1)


def _attention_dropout(model: PreTrainedModel) -> float:
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return max(float(getattr(model.config, name, None) or 0.0) for name in names)


def _sliding_window(config: object) -> int | None:
    window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and getattr(config, "use_sliding_window", True) else None
