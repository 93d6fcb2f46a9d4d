"""verl's custom reward function: set `compute_score` in verl's configuration.

```
reward.custom_reward_function.path=pkg://marginrm.integrations.verl
reward.custom_reward_function.name=compute_score
+reward.custom_reward_function.reward_kwargs.base_url=http://127.0.0.1:8000
```
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from marginrm.client import ItemScoreError, RewardClient
from marginrm.errors import ConfigError
from marginrm.text import Truncation

_lock = threading.Lock()


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    base_url: str = "http://127.0.0.1:8000",
    model: str = "default",
    api_key: str | None = None,
    truncation: Truncation = "error",
    prompt_key: str = "prompt",
    unscorable: float | None = None,
    **others: Any,
) -> dict[str, float]:
    """Returns the reward of one of verl's responses.

    verl passes no prompt to a reward function, so the data must hold it in `extra_info`. The function is thread-safe;
    all threads share one client.

    Args:
        data_source: Ignored.
        solution_str: The response.
        ground_truth: Ignored.
        extra_info: Mapping that holds the prompt, a text or a list of messages, under `prompt_key`.
        base_url: Address of the server.
        model: Name of the served model.
        api_key: API key, sent as a bearer token.
        truncation: As for `RewardClient`.
        prompt_key: Key of the prompt in `extra_info`.
        unscorable: Reward of a response that cannot be scored, such as an empty one; by default it raises.
        **others: Arguments that verl adds for its own reward models; ignored.

    Raises:
        ConfigError: `extra_info` holds no prompt.
        ItemScoreError: The response cannot be scored, and `unscorable` is not set.
        RewardClientError: The server refused the call or did not answer.
    """
    prompt = (extra_info or {}).get(prompt_key)
    if prompt is None:
        raise ConfigError(
            f"extra_info[{prompt_key!r}] is missing. verl passes no prompt to a reward function, so each row of the data "
            "needs it there. Set reward_kwargs.prompt_key if it has another name."
        )
    # A list of messages from a Parquet file arrives as an array.
    messages = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    try:
        with _lock:  # without the lock, concurrent first calls would each make a client
            client = _client(base_url, model, api_key, truncation)
        (reward,) = client.score(messages, [solution_str])
    except ItemScoreError:
        if unscorable is None:
            raise
        return {"score": unscorable}
    return {"score": reward}


@cache
def _client(base_url: str, model: str, api_key: str | None, truncation: Truncation) -> RewardClient:
    return RewardClient(base_url, model=model, api_key=api_key, truncation=truncation)
