"""A simulation of many replicas behind a router: routing by prompt or at random, prefix caches, and scaling.

Events are taken in the order of their times: a request arrives and the router gives it to a replica; a step ends and its
requests are answered; the scaler looks at the queues. A replica computes as `replica.Replica` says, and computes a
prompt only where its prefix cache does not hold it.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from marginrm.sizing.replica import Replica

Routing = Literal["random", "affine"]
_ROOM = 2  # steps: an affine router passes by a replica with more tokens queued than this


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTraffic:
    """The traffic of RL trainers: several samples of a prompt, each in a request of its own.

    Attributes:
        prompt_tokens: Tokens of a prompt.
        response_tokens: Mean tokens of a sample; they follow an exponential distribution.
        samples: Samples of each prompt.
        spread_seconds: The samples of a prompt come within so many seconds after the first.
    """

    prompt_tokens: int = 800
    response_tokens: int = 200
    samples: int = 16
    spread_seconds: float = 30.0

    def requests(self, rate: float, seconds: float, seed: int) -> list[Request]:
        """Returns the requests of some seconds, by time.

        Args:
            rate: Requests per second.
            seconds: Duration.
            seed: Of the random numbers.
        """
        generator = np.random.default_rng(seed)
        start = -self.spread_seconds  # so that the load is whole from the first second on
        prompts = generator.poisson(rate / self.samples * (seconds - start))
        first = generator.uniform(start, seconds, prompts)
        times = first[:, None] + generator.uniform(0, self.spread_seconds, (prompts, self.samples))
        tokens = generator.exponential(self.response_tokens, (prompts, self.samples))
        return sorted(
            Request(float(time), prompt, self.prompt_tokens, float(cost))
            for prompt in range(prompts)
            for time, cost in zip(times[prompt], tokens[prompt], strict=True)
            if 0 <= time < seconds
        )


@dataclass(frozen=True, slots=True, order=True)
class Request:
    """One request: its time of arrival in seconds, its prompt, and the tokens of both parts."""

    time: float
    prompt: int
    prompt_tokens: float
    response_tokens: float

    @property
    def tokens(self) -> float:
        """Tokens without any cache."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """The rule of a horizontal autoscaler on queued tokens, as Kubernetes computes it.

    Attributes:
        least: Fewest replicas.
        most: Most replicas.
        target: Queued tokens per replica that it aims at.
        interval: Seconds between two looks.
        start_seconds: Seconds from the decision until a new replica serves.
        calm_seconds: Seconds without need before a replica is taken away.
    """

    least: int
    most: int
    target: float
    interval: float = 15.0
    start_seconds: float = 60.0
    calm_seconds: float = 300.0


@dataclass(slots=True)
class _Server:
    """One simulated replica."""

    spec: Replica
    cache_tokens: float
    waiting: deque[Request] = field(default_factory=deque)
    step: list[Request] = field(default_factory=list)
    cache: OrderedDict[int, float] = field(default_factory=OrderedDict)
    held: float = 0.0  # tokens that wait or are computed, without any cache
    cached: float = 0.0
    computed: float = 0.0

    def begin(self) -> float:
        """Takes the next step; returns its seconds."""
        tokens = 0.0
        prompts: set[int] = set()
        while self.waiting:
            request = self.waiting[0]
            known = request.prompt in prompts or request.prompt in self.cache
            cost = request.response_tokens + (0.0 if known else request.prompt_tokens)
            if self.step and tokens + cost > self.spec.step_tokens:
                break
            self.step.append(self.waiting.popleft())
            prompts.add(request.prompt)
            tokens += cost
        for request in self.step:
            self._keep(request)
        self.computed += tokens
        return self.spec.seconds(tokens)

    def end(self) -> list[Request]:
        """Ends the step; returns its requests."""
        answered, self.step = self.step, []
        self.held -= sum(request.tokens for request in answered)
        return answered

    def _keep(self, request: Request) -> None:
        if request.prompt in self.cache:
            self.cache.move_to_end(request.prompt)
            return
        self.cache[request.prompt] = request.prompt_tokens
        self.cached += request.prompt_tokens
        while self.cached > self.cache_tokens and self.cache:
            self.cached -= self.cache.popitem(last=False)[1]


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """A fleet under one traffic.

    Attributes:
        latencies: Seconds from arrival to answer of each accepted request.
        rejected: Share of the requests that were rejected.
        tokens_computed: Mean tokens computed per answered request.
        replicas: `(seconds, replicas that serve)` at each change.
    """

    latencies: NDArray[np.float64]
    rejected: float
    tokens_computed: float
    replicas: list[tuple[float, int]]

    def quantile(self, share: float) -> float:
        """Returns the latency in seconds that this share of the accepted requests stays below."""
        return float(np.quantile(self.latencies, share)) if len(self.latencies) else math.inf


def simulate_fleet(
    requests: list[Request],
    spec: Replica,
    replicas: int,
    *,
    routing: Routing,
    cache_tokens: float,
    scaling: Scaling | None = None,
    seed: int = 0,
) -> FleetLoad:
    """Simulates a fleet until its last request is answered.

    Args:
        requests: By time.
        spec: What each replica can do.
        replicas: How many serve at the start.
        routing: `affine`: the replica of a prompt by rendezvous hashing (Thaler and Ravishankar 1998), or its second one
            while the first has more than two steps queued. `random`: any replica. Ray Serve's router bounds loads in another
            way (`marginrm_service.ray_serve.affinity`), which is not simulated.
        cache_tokens: Tokens of prompts that each replica's prefix cache holds.
        scaling: The autoscaler's rule; None for a fixed number.
        seed: Of the router's choices.
    """
    fleet = _Fleet(spec, replicas, routing, cache_tokens, seed)
    return _Simulation(requests, fleet, scaling).run()


class _Simulation:
    """The events of one fleet, taken in the order of their times, until every request is answered or rejected."""

    def __init__(self, requests: list[Request], fleet: _Fleet, scaling: Scaling | None) -> None:
        self._requests = requests
        self._fleet = fleet
        self._order = count()  # equal times keep the order of their events
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        for request in requests:
            self._at(request.time, partial(self._arrive, request))
        if scaling:
            self._at(scaling.interval, partial(self._scale, scaling))
        self._history = [(0.0, fleet.serving)]
        self._latencies: list[float] = []
        self._rejected = 0
        self._starting = 0  # replicas on their way
        self._calm_since = 0.0

    def run(self) -> FleetLoad:
        """Takes events until the last request is answered."""
        while self._rejected + len(self._latencies) < len(self._requests):
            now, _, event = heapq.heappop(self._events)
            event(now)
        answered = len(self._latencies)
        computed = sum(server.computed for server in self._fleet.servers) / max(1, answered)
        return FleetLoad(np.asarray(self._latencies), self._rejected / len(self._requests), computed, self._history)

    def _at(self, time: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def _arrive(self, request: Request, now: float) -> None:
        server = self._fleet.route(request)
        if server is None:
            self._rejected += 1
        elif not server.step:
            self._begin(server, now)

    def _begin(self, server: _Server, now: float) -> None:
        self._at(now + server.begin(), partial(self._end, server))

    def _end(self, server: _Server, now: float) -> None:
        self._latencies += [now - request.time for request in server.end()]
        if server.waiting:
            self._begin(server, now)

    def _scale(self, rule: Scaling, now: float) -> None:
        fleet = self._fleet
        wanted = fleet.wanted(rule)
        missing = max(0, wanted - fleet.serving - self._starting)
        self._starting += missing
        for _ in range(missing):
            self._at(now + rule.start_seconds, partial(self._start, rule))
        if wanted >= fleet.serving:
            self._calm_since = now
        if now - self._calm_since >= rule.calm_seconds:
            self._serve(max(wanted, rule.least), now)
            self._calm_since = now
        self._at(now + rule.interval, partial(self._scale, rule))

    def _start(self, rule: Scaling, now: float) -> None:
        self._starting -= 1
        self._serve(min(self._fleet.serving + 1, rule.most), now)

    def _serve(self, replicas: int, now: float) -> None:
        self._fleet.serving = replicas
        self._history.append((now, replicas))


class _Fleet:
    """The replicas and their router. A replica that is taken away finishes what it holds."""

    def __init__(self, spec: Replica, replicas: int, routing: Routing, cache_tokens: float, seed: int) -> None:
        self._spec = spec
        self._cache_tokens = cache_tokens
        self._routing = routing
        self._generator = np.random.default_rng(seed)
        self.servers: list[_Server] = []
        self.serving = replicas

    def route(self, request: Request) -> _Server | None:
        """Gives a request to a replica; returns the replica, or None if its queue is full."""
        while len(self.servers) < self.serving:
            self.servers.append(_Server(self._spec, self._cache_tokens))
        chosen = int(self._generator.integers(self.serving))
        if self._routing == "affine":
            first, second = self._homes(request.prompt)
            busy = self.servers[first].held > _ROOM * self._spec.step_tokens
            chosen = min(first, second, key=lambda place: self.servers[place].held) if busy else first
        server = self.servers[chosen]
        if server.held + request.tokens > self._spec.queue_tokens:
            return None
        server.waiting.append(request)
        server.held += request.tokens
        return server

    def wanted(self, scaling: Scaling) -> int:
        """Returns the replicas that the autoscaler wants now."""
        held = sum(server.held for server in self.servers)
        return min(max(math.ceil(held / scaling.target), scaling.least), scaling.most)

    def _homes(self, prompt: int) -> tuple[int, int]:
        """Returns the two replicas with the highest hash of prompt and replica: few change with the number of replicas.

        More homes would spread each prompt over more caches, and a busy fleet would compute prompts again and again.
        """
        weights = _mixed(np.arange(self.serving, dtype=np.uint64) + np.uint64((prompt + 1) << 20))
        first = int(weights.argmax())
        weights[first] = 0
        return first, int(weights.argmax())


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns well-mixed bits of each value: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
