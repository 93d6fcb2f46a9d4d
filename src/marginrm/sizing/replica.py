"""The latency of one replica under a load, by simulation of its queue, and the highest rate that keeps a latency.

A replica computes steps one after another. A step takes the requests that wait, oldest first, up to its token budget,
and lasts a fixed time and a time for each token; all its requests are answered when it ends. So a request waits for the
step that runs, and for the steps before its own. The queue is one with batch service (Bailey 1954, "On queueing
processes with bulk service"); its quantiles have no simple form, so they are simulated. With one request in a step and
no time per step it is the M/G/1 queue, whose known formulas the tests hold it to.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marginrm.errors import ConfigError

STEP_SECONDS = 0.005  # of a step apart from its tokens, where it is not measured
_REQUESTS = 20_000  # of one simulation: 200 of them are above its p99
_WARM_UP = 0.1  # share of the requests, from an empty queue, that are left out
_BISECTIONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """What one replica can do.

    Attributes:
        tokens_per_second: Computed tokens per second when all steps are full, as a loaded server shows it.
        step_seconds: Seconds that a step takes apart from its tokens; a part of the time of a full step.
        step_tokens: The token budget of a step. A request above it gets a step to itself.
        queue_tokens: Tokens that may wait or be computed; a request beyond is rejected.

    Raises:
        ConfigError: A full step would take less than `step_seconds`.
    """

    tokens_per_second: float
    step_seconds: float = STEP_SECONDS
    step_tokens: int = 8_192
    queue_tokens: int = 2_000_000

    def __post_init__(self) -> None:
        full = self.step_tokens / self.tokens_per_second
        if self.step_seconds >= full:
            raise ConfigError(
                f"step_seconds = {self.step_seconds:g} must be less than the {full:.2g} s of a full step ({self.step_tokens:,} "
                f"tokens at {self.tokens_per_second:,.0f} tokens/s). Lower step_seconds, or raise step_tokens."
            )

    def seconds(self, tokens: float) -> float:
        """Returns the seconds of a step with so many tokens."""
        return self.step_seconds + tokens * (1 / self.tokens_per_second - self.step_seconds / self.step_tokens)

    def highest_token_rate(self, tokens: float) -> float:
        """Returns the tokens per second that full steps compute, for requests of so many tokens."""
        step = max(self.step_tokens, tokens)
        return step / self.seconds(step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests that come independently of each other (Poisson), each with a cost of its own.

    Attributes:
        tokens: Mean computed tokens of a request.
        spread: Standard deviation of that over its mean; costs follow a gamma distribution.
    """

    tokens: float
    spread: float = 0.5

    def costs(self, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
        """Returns the tokens of some requests, [count]."""
        if not self.spread:
            return np.full(count, float(self.tokens))
        shape = self.spread**-2
        return generator.gamma(shape, self.tokens / shape, count)


@dataclass(frozen=True, slots=True)
class Load:
    """One replica under one rate.

    Attributes:
        rate: Requests per second.
        latencies: Seconds from arrival to answer of each accepted request.
        rejected: Share of the requests that the full queue rejected.
        busy: Share of the time in which a step runs.
    """

    rate: float
    latencies: NDArray[np.float64]
    rejected: float
    busy: float

    def quantile(self, share: float) -> float:
        """Returns the latency in seconds that this share of the accepted requests stays below."""
        return float(np.quantile(self.latencies, share)) if len(self.latencies) else np.inf


def simulate(replica: Replica, traffic: Traffic, rate: float, *, requests: int = _REQUESTS, seed: int = 0) -> Load:
    """Simulates one replica.

    Args:
        replica: What it can do.
        traffic: The requests.
        rate: Requests per second.
        requests: How many of them.
        seed: Of the arrivals and costs. Loads of one seed differ by the rate alone.
    """
    generator = np.random.default_rng(seed)
    arrivals = (generator.exponential(1.0, requests).cumsum() / rate).tolist()
    costs = traffic.costs(requests, generator).tolist()
    waiting: deque[int] = deque()
    step: list[int] = []
    held = now = busy = 0.0  # tokens that wait or are computed; seconds
    place = rejected = 0
    answered = np.full(requests, np.nan)
    while place < requests or waiting:
        if not waiting:
            now = max(now, arrivals[place])
        while place < requests and arrivals[place] <= now:  # a step's own tokens are held until it ends
            if held + costs[place] <= replica.queue_tokens:
                waiting.append(place)
                held += costs[place]
            else:
                rejected += 1
            place += 1
        held -= sum(costs[index] for index in step)
        step = _take(waiting, costs, replica.step_tokens)
        if step:
            lasted = replica.seconds(sum(costs[index] for index in step))
            now, busy = now + lasted, busy + lasted
            answered[step] = now
    latencies = (answered - np.asarray(arrivals))[int(requests * _WARM_UP) :]
    return Load(rate, latencies[~np.isnan(latencies)], rejected / requests, busy / now)


def highest_rate(replica: Replica, traffic: Traffic, p99: float, *, seed: int = 0) -> Load:
    """Returns the highest rate whose p99 latency is at most `p99` seconds, with nothing rejected.

    Raises:
        ConfigError: Not even an idle replica answers that fast, or it has no room for such requests.
    """
    idle = simulate(replica, traffic, 1e-3 * replica.highest_token_rate(traffic.tokens) / traffic.tokens, seed=seed)
    if idle.rejected:
        raise ConfigError(
            f"An idle replica rejects {idle.rejected:.0%} of these requests: they have {traffic.tokens:,.0f} tokens on "
            f"average, and its queue takes {replica.queue_tokens:,}. Send fewer responses in a request."
        )
    if idle.quantile(0.99) > p99:
        raise ConfigError(
            f"p99 = {p99:g} s cannot be kept: an idle replica takes {idle.quantile(0.99):.3g} s for the longest 1% of these "
            "requests. Take a faster device, or shorter requests."
        )
    low, best = idle.rate, idle
    high = replica.highest_token_rate(traffic.tokens) / traffic.tokens
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        load = simulate(replica, traffic, middle, seed=seed)
        if load.quantile(0.99) <= p99 and not load.rejected:
            low, best = middle, load
        else:
            high = middle
    return best


def _take(waiting: deque[int], costs: list[float], budget: float) -> list[int]:
    """Takes the oldest requests that fit into a step; one above the budget alone."""
    step: list[int] = []
    room = budget
    while waiting and (not step or costs[waiting[0]] <= room):
        index = waiting.popleft()
        room -= costs[index]
        step.append(index)
    return step
