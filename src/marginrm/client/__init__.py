"""`RewardClient` and `AsyncRewardClient`: rewards, comparisons and rankings from a marginrm server. No torch needed.

```python
with RewardClient("http://127.0.0.1:8000") as client:
    rewards = client.score(prompt, responses)
    comparison = client.compare(prompt, chosen, rejected)
    best = candidates[client.best_of_n(prompt, candidates).best]
```

Connections are kept and reused. Temporary failures (429, 502, 503, 504, a broken connection) are retried with growing,
jittered waits, and not before the server's `Retry-After`. The errors are drawn in `marginrm.client.errors`. `calls` and
`stream` decide what is sent and when; `blocking` and `awaiting` carry it out.
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
