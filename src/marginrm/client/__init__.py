"""`RewardClient` and `AsyncRewardClient`: rewards, comparisons and rankings from a marginrm server. No torch needed.

```python
with RewardClient("http://127.0.0.1:8000") as client:
    rewards = client.score(prompt, responses)
    comparison = client.compare(prompt, chosen, rejected)
    best = candidates[client.best_of_n(prompt, candidates).best]
```

Connections are kept and reused. What may pass (429, 502, 503, 504, a connection that breaks) is tried again with
growing, jittered waits, and not before the server's `Retry-After`. Errors are drawn in `marginrm.client.errors`. What is
sent and when is decided in `calls` and `stream`; `blocking` and `awaiting` are the two loops that do it.
"""

from marginrm.client.awaiting import AsyncRewardClient
from marginrm.client.blocking import RewardClient
from marginrm.client.errors import (
    DeadlineError,
    InvalidRequestError,
    ItemScoreError,
    NotFoundError,
    OverloadedError,
    ResponseError,
    RewardClientError,
    ServerError,
    TransportError,
    UnauthorizedError,
    UnexpectedReplyError,
)

__all__ = [
    "AsyncRewardClient",
    "DeadlineError",
    "InvalidRequestError",
    "ItemScoreError",
    "NotFoundError",
    "OverloadedError",
    "ResponseError",
    "RewardClient",
    "RewardClientError",
    "ServerError",
    "TransportError",
    "UnauthorizedError",
    "UnexpectedReplyError",
]
