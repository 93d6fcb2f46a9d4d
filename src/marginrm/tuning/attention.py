"""Chooses the attention backend at load time, by checking and timing each one on this machine.

FlexAttention reads each token of the row in place, by one kernel for rows of any length, and skips blocks that hold
nothing. It is compiled by Triton for each GPU, and a prototype in PyTorch, so it is taken only if its rewards, and for
training its gradients, agree with gathered attention on the device itself. On CPUs it is slower than gathered attention
and has no backward pass. There, long shared prefixes are computed apart if the model allows it. For scoring in bfloat16
on processors with matrix tiles (AMX), a kernel of our own is compiled and tried. Other decoders in half precision compute
attention by matrix products if a trial finds them faster than PyTorch's fused kernel.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marginrm.amx import kernels
from marginrm.attention.amx import tile_layout
from marginrm.attention.flex import interval_layout
from marginrm.attention.gathered import gathered_layout
from marginrm.attention.layout import AttentionOptions, LayoutFn, UnsupportedAttentionError
from marginrm.attention.matmul import matmul_attention
from marginrm.forward.batch import PackedBatch, pack
from marginrm.forward.execution import Attention, Choice
from marginrm.forward.module import RewardModule, evaluating
from marginrm.forward.self_check import difference, groups_for, tolerance
from marginrm.packing import plan_row
from marginrm.tuning.timing import best_seconds

# The longer probe's row has several blocks, of which some hold nothing. The shorter one's is within a block, for which
# torch compiles another kernel: now, not at the first short request.
_PROBE_TOKENS = (12, 300)
_WORTH_IT = 1.1  # speed relative to the fused kernel from which on matrix products are taken
_TRIAL = 4, 256  # sequences and tokens of the timing


def try_it(
    module: RewardModule, wanted: Literal["auto", "gathered", "flex"] = "auto", *, gradients: bool = False
) -> Choice:
    """Chooses the attention backend for packed rows on the device where the weights are now.

    Args:
        module: Its `execution` is changed.
        wanted: `auto` tries FlexAttention on CUDA, and on CPUs shared prefixes and, for scoring, other kernels; `flex`
            tries FlexAttention on any device.
        gradients: Whether the module is to be trained, so that gradients must agree too.
    """
    undo(module)
    if module.forward_path != "packed" or wanted == "gathered":
        return Choice(False, "")
    if wanted == "flex" or module.device.type == "cuda":
        return _try_flex(module, gradients=gradients)
    decoder = module.architecture == "decoder"
    if decoder:
        splits = not (gradients and _attention_dropout(module)) and _splits_exactly(module)
        module.execution = replace(module.execution, splits_prefix=splits)
    if gradients or module.dtype == torch.float32:
        return Choice(False, "")
    tiles = _try_tiles(module) if module.dtype == torch.bfloat16 and kernels.supported() else Choice(False, "")
    if tiles.taken or not decoder:
        return tiles
    products = _try_matmul(module)
    return Choice(products.taken, "; ".join(filter(None, (tiles.reason, products.reason))))


def undo(module: RewardModule) -> None:
    """Goes back to gathered attention over whole sequences."""
    module.execution = replace(module.execution, attention="gathered", splits_prefix=False)


def _take(module: RewardModule, attention: Attention) -> None:
    module.execution = replace(module.execution, attention=attention)


def _try_tiles(module: RewardModule) -> Choice:
    name = "attention by matrix tiles (AMX)"
    try:
        kernels.load_kernels()
        with torch.inference_mode():
            found, expected = (
                _rewards(module, max(_PROBE_TOKENS), layout) for layout in (tile_layout, gathered_layout)
            )
            speed = tiles_speed(module)
    except kernels.KernelUnavailableError as error:
        return Choice(False, f"no {name}, since {error}")
    worst = difference(found, expected)
    if worst > tolerance(module):
        return Choice(False, f"no {name}, since rewards differ by {worst:.2g} in a probe")
    taken = speed >= _WORTH_IT
    if taken:
        _take(module, "amx")
    return Choice(taken, f"{name if taken else f'no {name}'} ({speed:.2f}x the speed of gathered attention in a trial)")


def tiles_speed(module: RewardModule) -> float:
    """Returns the speed of the kernel relative to gathered attention, for this module's heads."""
    sequences, tokens = _TRIAL
    groups = [[np.arange(tokens, dtype=np.int32) + number * tokens] for number in range(sequences)]
    plan = plan_row(groups, causal=module.architecture == "decoder")
    query, key = _random(module, 1, len(plan.ids))
    tiles, gathered = tile_layout(plan), gathered_layout(plan)
    with torch.inference_mode():
        slow, quick = best_seconds(
            lambda: gathered.attend(query, key, key, AttentionOptions()),
            lambda: tiles.attend(query, key, key, AttentionOptions()),
        )
    return slow / quick


def _try_matmul(module: RewardModule) -> Choice:
    speed = matmul_speed(module)
    taken = speed >= _WORTH_IT
    if taken:
        _take(module, "matmul")
    chosen = "matrix products" if taken else "PyTorch's fused kernel"
    return Choice(taken, f"attention by {chosen} (products: {speed:.2f}x the fused kernel's speed in a trial)")


def matmul_speed(module: RewardModule) -> float:
    """Returns the speed of `matmul_attention` relative to PyTorch's fused kernel, for this module's heads and dtype."""
    query, key = _random(module, *_TRIAL)
    grouped = query.shape[1] != key.shape[1]
    attend = F.scaled_dot_product_attention
    with torch.inference_mode():
        fused, products = best_seconds(
            lambda: attend(query, key, key, is_causal=True, enable_gqa=grouped),
            lambda: matmul_attention(query, key, key, None, None, AttentionOptions()),
        )
    return fused / products


def _random(module: RewardModule, sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Returns queries and keys with this module's heads, as a layer passes them: [sequences, heads, tokens, head size]."""
    config = module.base.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shapes = ((sequences, tokens, count, size) for count in (heads, key_heads))
    query, key = (torch.randn(shape, dtype=module.dtype).transpose(1, 2) for shape in shapes)
    return query, key


def _splits_exactly(module: RewardModule) -> bool:
    """Says if the model's attention can be computed apart for a shared prefix."""
    try:
        with torch.inference_mode():
            found, expected = (
                _rewards(module, min(_PROBE_TOKENS), layout)
                for layout in (partial(gathered_layout, split_from=2), gathered_layout)
            )
    except UnsupportedAttentionError:
        return False
    return difference(found, expected) <= tolerance(module)


def _try_flex(module: RewardModule, *, gradients: bool) -> Choice:
    try:
        obstacle = "does not support dropout" if gradients and _attention_dropout(module) else _rewards_differ(module)
        obstacle = obstacle or (_gradients_differ(module) if gradients else None)
    except Exception as error:  # noqa: BLE001 - compiler and driver raise errors of any class, and there is another way
        obstacle = f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if obstacle is not None:
        return Choice(False, f"attention on gathered sequences, since FlexAttention {obstacle}")
    _take(module, "flex")
    return Choice(True, "attention by FlexAttention")


def _rewards_differ(module: RewardModule) -> str | None:
    with torch.inference_mode():
        found, expected = (
            torch.cat([_rewards(module, longest, layout) for longest in _PROBE_TOKENS])
            for layout in (interval_layout, gathered_layout)
        )
    worst = difference(found, expected)
    return None if worst <= tolerance(module) else f"gave rewards that differ by {worst:.2g} in a probe"


def _gradients_differ(module: RewardModule) -> str | None:
    found, expected = (
        gradient(module, _batch(module, max(_PROBE_TOKENS), layout)) for layout in (interval_layout, gathered_layout)
    )
    worst = float((found - expected).norm() / expected.norm())
    return None if worst <= tolerance(module) else f"gave gradients that differ by {worst:.2g} in a probe"


def gradient(module: RewardModule, batch: PackedBatch) -> Tensor:
    """Returns the gradient of the rewards' sum by the embedded tokens, which has passed through every layer's attention."""
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        embedded.append(output.requires_grad_())  # with LoRA it requires none by itself

    hook = module.base.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad(), evaluating(module):
            return torch.autograd.grad(module(batch).sum(), embedded)[0].float()
    finally:
        hook.remove()


def _rewards(module: RewardModule, longest: int, layout: LayoutFn) -> Tensor:
    with evaluating(module):
        rewards: Tensor = module(_batch(module, longest, layout))
        return rewards


def _batch(module: RewardModule, longest: int, layout: LayoutFn) -> PackedBatch:
    return pack(groups_for(module, longest), causal=module.architecture == "decoder", layout=layout).to(module.device)


def _attention_dropout(module: RewardModule) -> float:
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return max(float(getattr(module.base.config, name, None) or 0.0) for name in names)
