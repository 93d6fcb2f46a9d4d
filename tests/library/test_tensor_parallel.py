"""Models whose layers several processes share: rewards of transformers' own forward in one process, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from marginrm import RewardModel
from marginrm.errors import ConfigError, ModelError
from support.models import SENTENCES, tiny_checkpoint

PROMPT = "Why does bread rise?"
RESPONSES = [SENTENCES[2], "No.", " ".join(SENTENCES)]
TOLERANCE = 1e-5


@pytest.fixture(params=["llama", "gpt_neox"])
def checkpoint(request, tmp_path) -> Path:
    """Grouped queries, and queries, keys and values in one matrix."""
    return tiny_checkpoint(tmp_path, request.param, kv_heads=2 if request.param == "llama" else None)


@pytest.fixture
def model(checkpoint) -> Iterator[RewardModel]:
    loaded = RewardModel.from_pretrained(checkpoint, dtype="float32", device="cpu", token_budget=64, tensor_parallel=2)
    yield loaded
    loaded.close()


def by_transformers(checkpoint: Path, model: RewardModel) -> list[float]:
    """The rewards of the same token ids by transformers' classifier, whole and in this process."""
    whole = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = [torch.tensor([model.encoder.encode(PROMPT, response).ids]) for response in RESPONSES]
    with torch.inference_mode():
        return [whole(input_ids=one).logits[0, 0].item() for one in ids]


def test_rewards_are_those_of_one_process(checkpoint, model):
    assert model.forward_path == "packed"
    assert "shared among 2 processes" in model.forward_reason
    assert model.score(PROMPT, RESPONSES) == pytest.approx(by_transformers(checkpoint, model), abs=TOLERANCE)
    held = [type(one).__name__ for one in model.module.backbone.parameters()]
    assert "DTensor" in held  # a share and not the whole
    with pytest.raises(ConfigError, match="Load one such model in a process"):
        RewardModel.from_pretrained(checkpoint, dtype="float32", device="cpu", tensor_parallel=2)


def test_what_cannot_be_shared_is_refused(tmp_path):
    with pytest.raises(ModelError, match="its 1 attention heads cannot be shared evenly"):
        RewardModel.from_pretrained(
            tiny_checkpoint(tmp_path / "one", "llama", kv_heads=1), dtype="float32", device="cpu", tensor_parallel=2
        )
    with pytest.raises(ModelError, match="no plan for bert"):
        RewardModel.from_pretrained(tiny_checkpoint(tmp_path / "bert", "bert"), tensor_parallel=2)
    with pytest.raises(ConfigError, match="excludes compiled and deterministic"):
        RewardModel.from_pretrained(tmp_path / "one", deterministic=True, tensor_parallel=2)
    if torch.cuda.device_count() == 1:
        two = tiny_checkpoint(tmp_path / "two", "llama")
        with pytest.raises(ConfigError, match="this machine has 1 GPUs"):
            RewardModel.from_pretrained(two, dtype="float32", device="cuda", tensor_parallel=2)
