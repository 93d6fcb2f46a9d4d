"""Ray Serve's autoscaling policy for scoring: replicas by queued tokens.

A request has one response or a thousand. So the number of requests, Ray's default measure, says little about the work
that waits; tokens do. Ray pickles this module into its controller.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

QUEUED_TOKENS = "queued_tokens"


class QueuedTokens:
    """Asks for as many replicas as give each its share of the queued tokens.

    Ray adds the bounds and delays of `autoscaling_config`. Tokens are averaged over its `look_back_period_s`.

    Args:
        tokens_per_replica: Tokens that may wait or be computed on a replica: its tokens per second times the seconds
            that a request may wait.
    """

    def __init__(self, tokens_per_replica: float) -> None:
        if tokens_per_replica <= 0:
            raise ValueError(f"tokens_per_replica is {tokens_per_replica}; it must be above 0.")
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Returns the number of replicas, and the policy's state for the next call: none."""
        queued = (context.aggregated_metrics or {}).get(QUEUED_TOKENS)
        if not queued:  # nothing was reported yet
            return context.target_num_replicas, {}
        return sum(queued.values()) / self._tokens_per_replica, {}
