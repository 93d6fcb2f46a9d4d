"""TRL's own GRPO trainer with tools, on a tiny policy, with rewards from a running server. Needs `pip install trl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Qwen3Config

from marginrm import RewardModel
from marginrm.integrations.trl import reward_function
from support.models import decoder_tokenizer, tiny_checkpoint
from support.server import serving

trl = pytest.importorskip("trl", reason="needs TRL, in an environment of its own: pip install trl jmespath")
datasets = pytest.importorskip("datasets")

ASK = [{"role": "user", "content": "2 + 2?"}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}],
}
RESULT = {"role": "tool", "name": "add", "content": "4"}


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their sum.
    """
    return a + b


def template() -> str:
    """TRL's copy of the chat template of Qwen3, which it knows how to parse."""
    return (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")


def policy(folder: Path) -> Path:
    """A tiny policy that has learned to call the tool, then to answer, and at times to answer at once."""
    tokenizer = decoder_tokenizer(chat_template=template(), max_length=2048)
    tokenizer.eos_token = "<|im_end|>"
    conversations = [
        [*ASK, CALL, RESULT, {"role": "assistant", "content": "4"}],
        [*ASK, CALL, RESULT, {"role": "assistant", "content": "It is 4."}],
        [*ASK, {"role": "assistant", "content": "4"}],
    ]
    batch = tokenizer.apply_chat_template(
        conversations, tools=[add], return_dict=True, return_tensors="pt", padding=True, padding_side="right"
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(120):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_three_steps_of_grpo_with_tools_get_the_rewards_of_trls_own_path(tmp_path: Path) -> None:
    reward_folder = tiny_checkpoint(tmp_path / "reward", "qwen3", chat_template=template(), max_length=2048)
    seen: list[dict[str, Any]] = []
    with serving(RewardModel.from_pretrained(reward_folder, dtype="float32")) as server:
        served = reward_function(server.url)

        async def marginrm(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
            rewards = await served(prompts, completions, **columns)
            seen.extend({"turns": turns, "reward": reward} for turns, reward in zip(completions, rewards, strict=True))
            return rewards

        trainer = trl.GRPOTrainer(
            model=str(policy(tmp_path / "policy")),
            # TRL scores each completion with the same checkpoint in its own code, too.
            reward_funcs=[marginrm, AutoModelForSequenceClassification.from_pretrained(reward_folder)],
            reward_processing_classes=[None, AutoTokenizer.from_pretrained(reward_folder)],
            tools=[add],
            train_dataset=datasets.Dataset.from_list([{"prompt": ASK}] * 8),
            args=trl.GRPOConfig(
                output_dir=str(tmp_path / "run"), max_steps=3, num_generations=4, per_device_train_batch_size=8,
                max_completion_length=160, max_tool_calling_iterations=2, logging_steps=1, save_strategy="no",
                report_to=[], bf16=False, use_cpu=True, learning_rate=1e-4, temperature=1.2,
            ),
        )  # fmt: skip
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(steps) == 3
    (own,) = (key for key in steps[0] if key.startswith("rewards/") and key.endswith("/mean") and "marginrm" not in key)
    for entry in steps:
        assert entry["rewards/marginrm/mean"] == pytest.approx(entry[own], abs=1e-4)
    assert all(one["reward"] is not None for one in seen)
    lengths = {len(one["turns"]) for one in seen}
    assert max(lengths) >= 3  # a call, its result, and an answer
