"""Calls marginrm's reward function as verl's reward managers do, to try a server before a training run.

    marginrm serve --model checkpoints/demo
    python examples/verl_reward.py

In a training run, verl calls it with these settings:

    reward.custom_reward_function.path=pkg://marginrm.integrations.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.base_url=http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse

from marginrm.integrations.verl import compute_score

PROMPT = [{"role": "user", "content": "What is the capital of France?"}]


def main() -> None:
    """Prints the score of two responses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    url = parser.parse_args().url
    for response in ("The capital of France is Paris.", "I do not know."):
        result = compute_score(
            data_source="example",
            solution_str=response,
            ground_truth=None,
            extra_info={"prompt": PROMPT},
            base_url=url,
        )
        print(f"{result['score']:+.4f}  {response}")


if __name__ == "__main__":
    main()
