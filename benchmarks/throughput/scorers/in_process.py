"""marginrm in process: texts in, rewards out, tokenisation included."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.texts import Sample, TokenizedGroup
from marginrm import RewardModel
from marginrm.allocator import keep_memory
from marginrm.encoding import EncodedResponse
from marginrm.errors import EncodingError
from marginrm.forward.batch import Batch
from marginrm.forward.module import RewardModule
from marginrm.text import Dtype
from marginrm.tuning.last_layer import last_layer
from marginrm.tuning.tune import tune

_GEMM_SIZES = {"cpu": 4096, "cuda": 8192}  # a GPU multiplies 4096 x 4096 in little more than the time of a launch
_GEMM_REPEATS = 5
# Products that the last layer computes for every token, even when it computes the others for reward tokens only.
_BEFORE_ATTENTION = {"q_proj", "k_proj", "v_proj", "query_key_value", "query", "key", "value"}


class InProcess:
    """`RewardModel` as Python programs use it.

    Args:
        folder: The model.
        dtype: Dtype of the backbone; `auto` as in the server.
        device: `cpu` or `cuda`.
        token_budget: The most tokens of a forward pass; measured by default, as in the server.
        compiled: Whether the operators between matrix products are compiled.
        deterministic: Whether rewards are batch-invariant.
        whole_last_layer: Whether to compute the last layer for every token.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Dtype = "auto",
        device: str = "cpu",
        token_budget: int | None = None,
        compiled: bool = False,
        deterministic: bool = False,
        whole_last_layer: bool = False,
    ) -> None:
        keep_memory()
        self._model = RewardModel.from_pretrained(
            folder,
            dtype=dtype,
            device=device,
            token_budget=token_budget,
            compiled=compiled,
            deterministic=deterministic,
        )
        if token_budget is None:
            self._model.measure_token_budget()
        self._module = self._model.module
        if whole_last_layer:
            tune(self._module, "compiled_scoring" if compiled else "scoring", whole_last_layer=True)
        self._module.register_forward_pre_hook(self._count)
        self.computed: int | None = None
        self._last = Sample(())
        linear = sum(_linear_weights(self._module).values())
        self.detail: dict[str, Any] = {
            "dtype": self._model.info.dtype,
            "attention": self._module.execution.attention,
            "path": self._model.forward_reason,
            "token_budget": self._model.token_budget,
            "linear_parameters": linear,
            "linear_computed": linear - _skipped_weights(self._module),
            "weight_bytes": sum(weight.nbytes for weight in self._module.parameters()),
        }

    def prepare(self, sample: Sample) -> Sample:
        """Returns the sample.

        Raises:
            ValueError: The model's encoder gives other token ids than the sample has.
        """
        for group in sample.groups:
            if tuple(response.ids for response in self._encoded(group)) != group.ids:
                raise ValueError("the model's encoder gives other token ids than the sample that peers receive")
        return sample

    def run(self, work: Sample) -> list[float]:
        """Encodes and scores."""
        self.computed = 0
        self._last = work
        rewards = self._model.score_encoded([self._encoded(group) for group in work.groups])
        return [reward for group in rewards for reward in group]

    def gemm_rate(self) -> float:
        """Returns the best rate of a large matrix product in the model's dtype, in FLOP/s."""
        size = _GEMM_SIZES[self._module.device.type]
        left, right = (torch.randn(size, size).to(self._module.device, self._module.dtype) for _ in range(2))
        best = float("inf")
        for _ in range(_GEMM_REPEATS):
            started = time.perf_counter()
            float((left @ right)[0, 0])  # reading an element waits for the device
            best = min(best, time.perf_counter() - started)
        return 2 * size**3 / best

    def host_share(self) -> float | None:
        """Runs the last sample again and returns the share of the time in which no GPU kernel ran; None on CPUs."""
        if self._module.device.type != "cuda":
            return None
        started = time.perf_counter()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.run(self._last)
        seconds = time.perf_counter() - started
        busy: float = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
        return max(0.0, 1 - busy / seconds)

    def _encoded(self, group: TokenizedGroup) -> list[EncodedResponse]:
        encoded = []
        for outcome in self._model.encoder.encode_group(group.prompt, group.responses):
            if isinstance(outcome, EncodingError):
                raise outcome
            encoded.append(outcome)
        return encoded

    def _count(self, _: nn.Module, inputs: tuple[Batch, ...]) -> None:
        self.computed = (self.computed or 0) + inputs[0].tokens


def _linear_weights(part: nn.Module) -> dict[str, int]:
    """Returns the number of weights of each linear layer by its name: 2 FLOP each for every token."""
    return {name: layer.weight.numel() for name, layer in part.named_modules() if isinstance(layer, nn.Linear)}


def _skipped_weights(module: RewardModule) -> int:
    """Returns the number of weights that multiply reward tokens only."""
    layer = last_layer(module) if module.execution.last_layer == "reward_tokens" else None
    weights = _linear_weights(layer) if layer else {}
    return sum(count for name, count in weights.items() if name.rsplit(".", 1)[-1] not in _BEFORE_ATTENTION)


load = InProcess
