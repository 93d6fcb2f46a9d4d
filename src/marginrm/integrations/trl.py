"""TRL's reward function: pass the result of `reward_function(url)` to a trainer as `reward_funcs`.

```python
trainer = GRPOTrainer(model=..., reward_funcs=reward_function("http://127.0.0.1:8000"), ...)
```
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from marginrm.client import AsyncRewardClient, ItemScoreError
from marginrm.text import Truncation

_log = logging.getLogger(__name__)

RewardFunction = Callable[..., Awaitable[list[float | None]]]


def reward_function(
    base_url: str,
    *,
    name: str = "marginrm",
    model: str = "default",
    api_key: str | None = None,
    truncation: Truncation = "error",
    deadline: float | None = None,
) -> RewardFunction:
    """Makes a reward function in TRL's shape that gets its rewards from a marginrm server.

    The function is asynchronous, so TRL runs it concurrently with its others. The completions of one prompt are sent
    together and share its computation. A completion with tools is a list of turns, and is scored whole, as TRL scores
    it with a reward model of its own; it may end with a tool call, its result, or an empty answer. A completion that
    cannot be scored (an empty text, over the model's limit, refused by the model's chat template) gets None, which TRL
    leaves out, and a warning in the log.

    Args:
        base_url: Address of the server, such as `http://127.0.0.1:8000`.
        name: Name of the rewards in TRL's log.
        model: Name of the served model.
        api_key: API key, sent as a bearer token.
        truncation: As for `RewardClient`.
        deadline: Seconds for one request with all its retries; no limit by default.

    Returns:
        `async (prompts, completions, **columns) -> list[float | None]`, one reward per completion, in order. Prompts
        and completions are texts, or lists of messages. It raises `RewardClientError` if the server does not answer.
    """

    async def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        groups, members = _groups(prompts, completions)
        rewards: list[float | None] = [None] * len(completions)
        async with AsyncRewardClient(
            base_url, model=model, api_key=api_key, truncation=truncation, deadline=deadline
        ) as client:
            for places, found in zip(members, await _rewards(client, groups), strict=True):
                for place, value in zip(places, found, strict=True):
                    rewards[place] = value
        return rewards

    reward.__name__ = name
    return reward


async def _rewards(client: AsyncRewardClient, groups: list[dict[str, Any]]) -> list[list[float | None]]:
    """Returns each group's rewards. If a completion is unusable, those of its group are scored again one by one."""
    results: list[list[float | None]] = []
    for group, ranking in zip(groups, await client.best_of_n_many(groups), strict=True):
        if not isinstance(ranking, ItemScoreError):
            rewards = {entry.candidate: entry.reward for entry in ranking.ranking}
            results.append([rewards[index] for index in range(len(group["candidates"]))])
            continue
        alone = [{"prompt": group["prompt"], "candidates": [candidate]} for candidate in group["candidates"]]
        outcomes = await client.best_of_n_many(alone) if len(alone) > 1 else [ranking]
        failed = [outcome for outcome in outcomes if isinstance(outcome, ItemScoreError)]
        if failed:
            _log.warning("%d of %d completions get no reward; the first: %s", len(failed), len(alone), failed[0])
        results.append([None if isinstance(one, ItemScoreError) else one.ranking[0].reward for one in outcomes])
    return results


def _groups(prompts: Sequence[Any], completions: Sequence[Any]) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Returns groups of consecutive completions with one prompt, and the positions of their members."""
    groups: list[dict[str, Any]] = []
    members: list[list[int]] = []
    for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not groups or groups[-1]["prompt"] != prompt:
            groups.append({"prompt": prompt, "candidates": []})
            members.append([])
        groups[-1]["candidates"].append(completion or "")
        members[-1].append(place)
    return groups, members
