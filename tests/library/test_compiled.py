"""Compiled parts give the rewards that they gave before, and only where nobody wants gradients."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from marginrm import RewardModel
from marginrm.loading import load_for_scoring
from support.models import tiny_checkpoint

PROMPT = "Name a colour."
RESPONSES = ["Blue.", "Blue, like the sky on a clear day.", "No."]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, as it imports its compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")
def test_compiled_rewards_are_the_same_at_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "qwen3")
    torch.compiler.reset()  # what another test compiled would not be compiled again
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    plain = RewardModel.from_pretrained(folder, dtype="float32")
    expected = [plain.score(PROMPT, RESPONSES[:count]) for count in (1, 2, 3)]

    model = RewardModel.from_pretrained(folder, dtype="float32", compiled=True)

    assert any(tmp_path.joinpath("cache").rglob("*.so")), "nothing was compiled"
    found = [model.score(PROMPT, RESPONSES[:count]) for count in (1, 2, 3)]
    for rewards, wanted in zip(found, expected, strict=True):
        assert rewards == pytest.approx(wanted, abs=1e-5)
    module, *_ = load_for_scoring(folder, dtype="float32", purpose=None)
    row = module.collate([model.encoder.encode_group(PROMPT, RESPONSES)])  # type: ignore[list-item]
    module(row).sum().backward()  # the family's shared rotary function still has gradients
    assert all(torch.isfinite(weight.grad).all() for weight in module.parameters() if weight.grad is not None)
