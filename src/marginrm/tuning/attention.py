"""Which attention goes over a module's packed rows: what proves itself at load, on the machine itself.

FlexAttention reads each token of the row where it lies, by one kernel for rows of any length, and skips the blocks that
nobody sees. It is a prototype of PyTorch's, compiled by Triton for each GPU, so it is taken only after its rewards, and
for training its gradients, have been those of the plain path on the device itself. On CPUs it is slower than
rectangles and has no backward pass. There, decoders in half precision that are to score compute their rectangles by
matrix products (`product_attention`) where a trial finds that faster than PyTorch's fused kernel.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from marginrm.attention.cpu_matmul import speedup
from marginrm.attention.flex import interval_layout
from marginrm.attention.gathered import unsplit_layout
from marginrm.encoding import EncodedResponse
from marginrm.forward.batch import PackedRow, pack, pad
from marginrm.forward.module import RewardModule, probe_difference, probe_groups, probe_tolerance

# The longer one's row has several blocks, some of them seen by nobody. The shorter one's is within a block, which torch
# compiles apart: now, not at the first short request.
_PROBE_TOKENS = (12, 300)
_WORTH_IT = 1.1  # times the fused kernel's speed, from which on products are taken


def choose_attention(
    module: RewardModule, wanted: Literal["auto", "rectangles", "flex"] = "auto", *, gradients: bool = False
) -> None:
    """Chooses the attention for packed rows on the device where the weights are now, and notes why.

    Where compiling fails or results differ, rectangles are taken, and `forward_reason` says so. Under autocast what is
    tried is what autocast makes of it.

    Args:
        module: Changed in place. After a move to another type of device it uses rectangles, by the fused kernel, until
            this is called again.
        wanted: `auto` tries FlexAttention on CUDA, and matrix products on CPUs for modules that are to score; `flex`
            tries FlexAttention wherever the weights are.
        gradients: Whether the module is to be trained, so that gradients must agree too.
    """
    module.flex_on, module.products_on, module.attention_reason = None, None, ""
    device = module.device.type
    if module.forward_path == "padded" or wanted == "rectangles":
        return
    if wanted == "flex" or device == "cuda":
        obstacle = _obstacle(module, gradients=gradients)
        if obstacle is None:
            module.flex_on, module.attention_reason = device, "attention by FlexAttention"
        else:
            module.attention_reason = f"attention on gathered lines, since FlexAttention {obstacle}"
    elif device == "cpu" and not gradients and module.architecture == "decoder" and module.dtype != torch.float32:
        times = _products_speedup(module)
        chosen = "matrix products" if times >= _WORTH_IT else "PyTorch's fused kernel"
        module.products_on = device if times >= _WORTH_IT else None
        module.attention_reason = f"attention by {chosen} (products: {times:.2f}x the fused kernel's speed in a trial)"


def _products_speedup(module: RewardModule) -> float:
    config = module.base.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return speedup(heads, getattr(config, "num_key_value_heads", None) or heads, size, module.dtype)


def _obstacle(module: RewardModule, *, gradients: bool) -> str | None:
    """Returns what speaks against FlexAttention for this module, here."""
    training = module.training
    module.eval()
    try:
        rewards = _rewards_differ(module)
        return rewards or (_gradients_differ(module) if gradients else None)
    except Exception as error:  # noqa: BLE001 - a compiler and a driver raise what they like, and there is another way
        return f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    finally:
        module.train(training)


def _rewards_differ(module: RewardModule) -> str | None:
    found, expected = [], []
    with torch.inference_mode():
        for longest in _PROBE_TOKENS:
            found.append(module(_row(module, longest, flex=True)))
            rows = pad(_groups(module, longest), pad_token_id=module.base.config.pad_token_id)
            expected.append(module(rows.to(module.device)))
        difference = probe_difference(torch.cat(found), torch.cat(expected))
    return None if difference <= probe_tolerance(module) else f"gave rewards that differ by {difference:.2g} in a probe"


def _gradients_differ(module: RewardModule) -> str | None:
    found, expected = (_gradient(module, _row(module, max(_PROBE_TOKENS), flex=flex)) for flex in (True, False))
    difference = float((found - expected).norm() / expected.norm())
    return (
        None if difference <= probe_tolerance(module) else f"gave gradients that differ by {difference:.2g} in a probe"
    )


def _gradient(module: RewardModule, row: PackedRow) -> Tensor:
    """Returns the gradient of the rewards' sum by the embedded tokens, which has come through every layer's attention."""
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        embedded.append(output.requires_grad_())  # with LoRA it has none of its own

    hook = module.base.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            return torch.autograd.grad(module(row).sum(), embedded)[0].float()
    finally:
        hook.remove()


def _row(module: RewardModule, longest: int, *, flex: bool) -> PackedRow:
    causal = module.architecture == "decoder"
    layout = interval_layout if flex else unsplit_layout
    return pack(_groups(module, longest), causal=causal, layout=layout).to(module.device)


def _groups(module: RewardModule, longest: int) -> list[list[EncodedResponse]]:
    return probe_groups(module.base.config.vocab_size, min(module.max_length, longest))
