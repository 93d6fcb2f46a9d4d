"""An encoder that is given more positions than it was published with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marginrm.encoding import EncodedResponse
from marginrm.errors import ConfigError
from marginrm.loading import load_for_training
from marginrm.reward_model import RewardModel
from support.models import tiny_checkpoint


def test_repeated_positions_leave_short_texts_as_they_were_and_long_ones_load_again(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "short", "bert")
    before, encoder = load_for_training(path, seed=0)
    longer = 2 * encoder.max_length + 7
    after, long_encoder = load_for_training(path, seed=0, positions=longer)
    assert long_encoder.max_length == longer
    short = [[EncodedResponse(tuple(range(5, 25)))]]
    long = [[EncodedResponse(tuple(5 + index % 90 for index in range(longer)))]]
    with torch.no_grad():
        torch.testing.assert_close(after(after.collate(short)), before(before.collate(short)), atol=1e-6, rtol=0)
        reward = float(after(after.collate(long)))
    after.classifier.save_pretrained(tmp_path / "long")
    long_encoder.tokenizer.save_pretrained(tmp_path / "long")
    again = RewardModel.from_pretrained(tmp_path / "long", dtype="float32")
    assert again.encoder.max_length == longer
    with torch.no_grad():
        assert float(again.module(again.module.collate(long))) == pytest.approx(reward, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "positions", "cure"), [("llama", 4096, "Take the setting out"), ("bert", 8, "Give more")]
)
def test_positions_that_cannot_be_repeated_say_so(tmp_path: Path, family: str, positions: int, cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        load_for_training(tiny_checkpoint(tmp_path, family), seed=0, positions=positions)
