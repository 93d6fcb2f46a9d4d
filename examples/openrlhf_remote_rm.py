"""Asks a running server for rewards as OpenRLHF does, to try a URL before a training run.

    marginrm serve --model checkpoints/demo
    python examples/openrlhf_remote_rm.py http://127.0.0.1:8000/get_reward

If OpenRLHF is installed, it calls OpenRLHF's own `SingleTurnAgentExecutor._fetch_rewards_via_http`. Without it, it sends the
same requests as that function (openrlhf/utils/agent.py) with aiohttp: texts split over the URLs given, 180 s, `json=`.
In a training run the URL goes to `--remote_rm_url`; its name in newer versions is `--reward.remote_url`.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import aiohttp

PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
QUERIES = [PROMPT + answer + "<|im_end|>\n" for answer in ("The capital of France is Paris.", "I do not know.")]


async def fetch(urls: list[str]) -> list[dict[str, Any]]:
    """Returns the answer of each URL."""
    columns = (QUERIES, [PROMPT] * len(QUERIES), [""] * len(QUERIES))
    try:
        from openrlhf.utils.agent import SingleTurnAgentExecutor
    except ImportError:
        print("OpenRLHF is not installed: the same requests, without it.")
    else:
        replies: list[dict[str, Any]] = await SingleTurnAgentExecutor(urls)._fetch_rewards_via_http(*columns)  # noqa: SLF001
        return replies
    share = -(-len(QUERIES) // len(urls))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session:

        async def post(start: int, url: str) -> dict[str, Any]:
            names = ("query", "prompts", "labels")
            payload = {name: column[start : start + share] for name, column in zip(names, columns, strict=True)}
            async with session.post(url, json=payload) as response:
                response.raise_for_status()
                answer: dict[str, Any] = await response.json()
                return answer

        return list(await asyncio.gather(*(post(place * share, url) for place, url in enumerate(urls))))


def main() -> None:
    """Prints the answer of each URL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+")
    for reply in asyncio.run(fetch(parser.parse_args().urls)):
        print(reply)


if __name__ == "__main__":
    main()
