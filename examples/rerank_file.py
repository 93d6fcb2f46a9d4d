"""Reranks a Best-of-N file through a running server, and prints the quality of the picks.

    marginrm serve --model checkpoints/alpaca_eval --max-length 512
    python examples/rerank_file.py $MARGINRM_DATA/alpaca_eval_best_of_n_test.jsonl.gz

Rows are `{"prompt", "candidates": [{"text", "win_prob"}, ...]}`; `gold` and `quality` are accepted too. A candidate over
the model's limit is never picked. It stays in the comparison with the longest text and with chance.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean

import httpx

from marginrm.errors import DataError
from marginrm.texts.preferences import read_groups


def main() -> None:
    """Asks the server for its picks, and prints their mean quality beside that of trivial rules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    picked, longest, chance, oracle = [], [], [], []
    unread = 0
    started = time.perf_counter()
    with httpx.Client(base_url=arguments.url, timeout=600) as http:
        for group in read_groups(arguments.file):
            if group.gold is None:
                raise DataError(f"{group.source}: the candidates have no gold quality.")
            body = {"truncation": "prompt_left", "prompts": [{"prompt": group.prompt, "candidates": group.candidates}]}
            answer = http.post("/best-of-n", json=body).raise_for_status().json()["prompts"][0]
            unread += len(answer.get("errors", ()))
            picked.append(group.gold[answer["best"]])
            longest.append(group.gold[max(range(len(group.gold)), key=lambda index: len(group.candidates[index]))])
            chance.append(mean(group.gold))
            oracle.append(max(group.gold))
    seconds = time.perf_counter() - started
    print(f"{len(picked)} prompts in {seconds:.1f} s; {unread} candidates too long for the model")
    for name, values in (
        ("the server's pick", picked),
        ("longest text", longest),
        ("random", chance),
        ("oracle", oracle),
    ):
        print(f"  {name:<18} {mean(values):.4f}")


if __name__ == "__main__":
    main()
