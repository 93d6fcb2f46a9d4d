"""Reranks answers with Cohere's own SDK against a running server. Only the base URL changes.

    marginrm serve --model checkpoints/demo
    python examples/cohere_rerank.py

Needs `pip install cohere`.
"""

from __future__ import annotations

import argparse
import os

import cohere

ANSWERS = ["I do not know.", "The capital of France is Paris.", "Red, yellow and blue."]


def main() -> None:
    """Prints the answers, best first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    url = parser.parse_args().url
    client = cohere.ClientV2(api_key=os.environ.get("MARGINRM_API_KEY", "none"), base_url=url)
    reply = client.rerank(model="rerank-v3.5", query="What is the capital of France?", documents=ANSWERS)
    for place, result in enumerate(reply.results, start=1):
        print(f"{place}. {result.relevance_score:+.4f}  {ANSWERS[result.index]}")


if __name__ == "__main__":
    main()
