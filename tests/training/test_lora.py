"""LoRA: the backbone is unchanged, the head is trained, and the merged checkpoint gives the trained rewards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marginrm import RewardModel
from marginrm.loading import load_for_training
from marginrm_training.config import LoraSection
from marginrm_training.run.lora import merge_lora, with_lora
from support.models import tiny_checkpoint


# peft 0.21 asks transformers 5.23 by a name that is deprecated there.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "bert"])
def test_trap_the_head_survives_and_the_merged_checkpoint_gives_the_trained_rewards(
    tmp_path: Path, family: str
) -> None:
    module, encoder = load_for_training(tiny_checkpoint(tmp_path / "base", family), seed=0)
    module = with_lora(module, LoraSection(rank=4), encoder.max_length)
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    groups = [[encoder.encode(f"Question {i}?", text) for text in ("Red.", "No.")] for i in range(3)]
    row = module.collate(groups)
    optimizer = torch.optim.SGD([weight for weight in module.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(3):
        rewards = module(row)
        optimizer.zero_grad()
        (rewards[1::2] - rewards[0::2]).mean().backward()
        optimizer.step()
    moved = {name for name, weight in module.named_parameters() if not torch.equal(weight, before[name])}
    assert any("modules_to_save" in name for name in moved)  # the head
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    trained = module(row).detach()
    merge_lora(module)
    module.classifier.save_pretrained(tmp_path / "out")
    encoder.tokenizer.save_pretrained(tmp_path / "out")
    served = RewardModel.from_pretrained(tmp_path / "out", dtype="float32")
    again = torch.tensor(served.score_encoded(groups)).flatten()
    torch.testing.assert_close(again, trained, atol=1e-5, rtol=1e-5)
