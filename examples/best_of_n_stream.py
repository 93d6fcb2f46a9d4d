"""Rank the candidates of many prompts, and write each ranking as soon as it arrives.

    python examples/best_of_n_stream.py groups.jsonl rankings.jsonl --url http://127.0.0.1:8000

A line of the input is {"prompt": ..., "candidates": [...]}. A line of the output is {"index", "best", "margin",
"confidence"}, or {"index", "error"}. `index` is the line number in the input, from 0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from marginrm.client import ItemScoreError, RewardClient


def main() -> None:
    """Streams one file through the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", type=Path)
    parser.add_argument("rankings", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    arguments = parser.parse_args()
    groups = [json.loads(line) for line in arguments.groups.read_text(encoding="utf-8").splitlines() if line.strip()]
    with (
        RewardClient(arguments.url, api_key=arguments.api_key) as client,
        arguments.rankings.open("w", encoding="utf-8") as file,
    ):
        for index, outcome in tqdm(client.best_of_n_stream(groups), total=len(groups), unit="prompt"):
            if isinstance(outcome, ItemScoreError):
                line = {"index": index, "error": outcome.message}
            else:
                line = {
                    "index": index,
                    "best": outcome.best,
                    "margin": outcome.margin,
                    "confidence": outcome.confidence,
                }
            file.write(json.dumps(line) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
