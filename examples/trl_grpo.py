"""A few steps of GRPO with TRL, with rewards from a running server.

    marginrm serve --model checkpoints/demo
    python examples/trl_grpo.py --policy Qwen/Qwen3-0.6B

Needs `pip install trl` beside marginrm. Any small causal language model works as the policy.
"""

from __future__ import annotations

import argparse
import tempfile

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from marginrm.integrations.trl import reward_function

PROMPTS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Why does bread rise?",
    "How do I boil an egg?",
]


def main() -> None:
    """Trains and prints each step's mean reward, as TRL logs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="a causal language model: a folder or a name on the Hub")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the marginrm server")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--completions", type=int, default=4, help="per prompt")
    options = parser.parse_args()
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=options.policy,
            reward_funcs=reward_function(options.url),
            train_dataset=Dataset.from_list(rows),
            args=GRPOConfig(
                output_dir=folder,
                max_steps=options.steps,
                num_generations=options.completions,
                per_device_train_batch_size=2 * options.completions,
                max_completion_length=32,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                bf16=False,
            ),
        )
        trainer.train()
        for entry in trainer.state.log_history:
            if "reward" in entry:
                print(f"step {entry['step']}: mean reward {entry['reward']:.4f}, deviation {entry['reward_std']:.4f}")


if __name__ == "__main__":
    main()
