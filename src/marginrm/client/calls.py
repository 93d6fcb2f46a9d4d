"""The client's logic without any I/O: each request is a generator that says what to send and how long to wait.

A call yields `Send` or `Wait` steps, is given back what came of each, and returns its result. A verb is one call, or
several that may run side by side (`Parallel`). `RewardClient` and `AsyncRewardClient` drive the same calls with a blocking
and an awaiting loop. Scoring changes nothing on the server, so that every request may be sent again.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from marginrm.client.errors import (
    DeadlineError,
    ItemScoreError,
    RewardClientError,
    TransportError,
    UnexpectedReplyError,
)
from marginrm.client.replies import (
    Outcome,
    Reply,
    Result,
    check_order,
    comparison,
    lone_item_error,
    or_raise,
    parsed,
    ranking,
    refusal,
    rewards_of,
)
from marginrm.preferences import CandidateGroup, PreferencePair
from marginrm.ranking import Comparison, Ranking, rank
from marginrm.schemas import BestOfNResponse, ModelCard, ModelInfo, ModelList, ScoreResponse
from marginrm.text import Prompt, Truncation

Pair = PreferencePair | Mapping[str, Any]
Group = CandidateGroup | Mapping[str, Any]

_LONGEST_WAIT = 60.0  # a server that asks for more is given up on: its caller knows better what to do meanwhile


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request. `timeout` is for each connect, read and write; `until` (monotonic seconds) is for it all.

    `headers` tell the server how long the answer is worth something, so that it drops what is too late.
    """

    method: str
    path: str
    content: bytes | None
    timeout: float
    until: float
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait so many seconds."""

    seconds: float


Call = Generator[Send | Wait, Outcome, Result]
_Model = TypeVar("_Model", bound=BaseModel)
_Part = TypeVar("_Part")
_Whole = TypeVar("_Whole")
_Other = TypeVar("_Other")


@dataclass(frozen=True, slots=True)
class Parallel(Generic[_Part, _Whole]):
    """Calls that may run side by side, and how their results, in order, become one."""

    calls: list[Call[_Part]]
    join: Callable[[list[_Part]], _Whole]

    def then(self, function: Callable[[_Whole], _Other]) -> Parallel[_Part, _Other]:
        """Returns the same calls with a function applied to their joint result."""
        return Parallel(self.calls, lambda parts: function(self.join(parts)))


@dataclass(frozen=True, slots=True)
class Slice:
    """Some candidates of one group: from `first` up to `stop` of group `group`."""

    group: int
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """What came of a slice, and the model that made it (None where there is no ranking)."""

    slice: Slice
    outcome: Ranking | ItemScoreError
    model: ModelInfo | None


@dataclass(frozen=True, slots=True)
class Calls:
    """The verbs of one client.

    Attributes:
        model: Name of the served model.
        truncation: What the server does with sequences that are too long.
        timeout: Seconds for each connect, read and write.
        deadline: Seconds for one verb with all its requests and retries; None for no limit.
        max_retries: How often a request is sent again.
        backoff: Seconds before the first retry; doubles with each, up to `backoff_max`.
        backoff_max: Seconds.
        batch_size: Responses in one request, at most.
        clock: Monotonic seconds.
        draw: Gives uniform numbers in [0, 1), for the jitter.
    """

    model: str = "default"
    truncation: Truncation = "error"
    timeout: float = 60.0
    deadline: float | None = None
    max_retries: int = 4
    backoff: float = 0.25
    backoff_max: float = 8.0
    batch_size: int = 256
    clock: Callable[[], float] = field(default=time.monotonic)
    draw: Callable[[], float] = field(default=random.random)

    def score(self, prompt: Prompt, responses: Sequence[str]) -> Parallel[list[Ranked], list[float]]:
        """One reward per response. Asks `/best-of-n`, where the prompt travels and is computed once."""
        if not responses:
            return Parallel([], lambda _: [])
        return self.best_of_n(prompt, responses, None, 0.5).then(lambda ranked: rewards_of(ranked, len(responses)))

    def compare(
        self, prompt: Prompt, chosen: str, rejected: str, tie_below: float
    ) -> Parallel[list[Comparison | ItemScoreError], Comparison]:
        """One pair."""
        pairs = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]
        return self.score_pairs(pairs, tie_below).then(lambda outcomes: or_raise(outcomes[0]))

    def best_of_n(
        self, prompt: Prompt, candidates: Sequence[str], top_k: int | None, tie_below: float
    ) -> Parallel[list[Ranked], Ranking]:
        """One group."""
        groups = [{"prompt": prompt, "candidates": list(candidates)}]
        return self.best_of_n_many(groups, top_k, tie_below).then(lambda outcomes: or_raise(outcomes[0]))

    def score_pairs(
        self, pairs: Sequence[Pair], tie_below: float
    ) -> Parallel[list[Comparison | ItemScoreError], list[Comparison | ItemScoreError]]:
        """Many pairs, in as few requests as `batch_size` allows."""
        size = max(1, self.batch_size // 2)
        until = self.until()
        calls = [
            self._pairs(pairs[start : start + size], start, tie_below, until) for start in range(0, len(pairs), size)
        ]
        return Parallel(calls, lambda parts: [outcome for part in parts for outcome in part])

    def best_of_n_many(
        self, groups: Sequence[Group], top_k: int | None, tie_below: float
    ) -> Parallel[list[Ranked], list[Ranking | ItemScoreError]]:
        """Many groups, in as few requests as `batch_size` allows; a larger group goes in slices, and is ranked here."""
        asked = self.groups(groups)
        sizes = [len(group["candidates"]) for group in asked]
        until = self.until()
        calls = [self._slices(asked, slices, top_k, tie_below, until) for slices in cut(sizes, self.batch_size)]

        def join(parts: list[list[Ranked]]) -> list[Ranking | ItemScoreError]:
            found: list[list[Ranked]] = [[] for _ in asked]
            for ranked in (one for part in parts for one in part):
                found[ranked.slice.group].append(ranked)
            return [rejoined(slices, top_k, tie_below) for slices in found]

        return Parallel(calls, join)

    def models(self) -> Call[list[ModelCard]]:
        """The served models."""
        return (yield from self._request("GET", "/v1/models", None, ModelList, self.until())).data

    def ready(self) -> Call[bool]:
        """One look, without retries."""
        outcome = yield self.send("GET", "/readyz", None, self.until())
        return isinstance(outcome, Reply) and outcome.status == 200

    def groups(self, groups: Sequence[Group]) -> list[dict[str, Any]]:
        """Returns groups as the server takes them."""
        return [_fields(group, ("prompt", "candidates")) for group in groups]

    def common(self, tie_below: float) -> dict[str, Any]:
        """Returns what every scoring request says."""
        return {"model": self.model, "truncation": self.truncation, "tie_below": tie_below}

    def until(self) -> float:
        """Returns when a verb that begins now has to be done, in seconds of `clock`."""
        return math.inf if self.deadline is None else self.clock() + self.deadline

    def send(
        self, method: str, path: str, content: bytes | None, until: float, accept: str = "application/json"
    ) -> Send:
        """Returns the step that sends a request."""
        left = max(0.001, until - self.clock())
        headers = {"Accept": accept} | ({"X-Request-Timeout": f"{left:.3f}"} if math.isfinite(left) else {})
        return Send(method, path, content, min(self.timeout, left), until, headers)

    def pause(self, outcome: Outcome, attempt: int, until: float) -> Call[None]:
        """Waits before a failed request is sent again; raises what it failed with if there is no use in that."""
        error, wait = refusal(outcome, attempt + 1)
        if wait is None or attempt >= self.max_retries:
            raise error
        backoff = min(self.backoff_max, self.backoff * 2**attempt) * (1 + self.draw()) / 2
        wait = max(wait, backoff)
        late = isinstance(error, TransportError) or error.code == "deadline_exceeded"
        if late and self.clock() + wait >= until:
            raise DeadlineError(f"No answer within {self.deadline:g} s. Last: {error}") from error
        if wait > _LONGEST_WAIT or self.clock() + wait >= until:
            raise error
        yield Wait(wait)

    def _pairs(
        self, pairs: Sequence[Pair], start: int, tie_below: float, until: float
    ) -> Call[list[Comparison | ItemScoreError]]:
        asked = [_fields(pair, ("prompt", "chosen", "rejected")) for pair in pairs]
        body = {**self.common(tie_below), "pairs": asked}
        try:
            reply = yield from self._request("POST", "/score", body, ScoreResponse, until)
        except RewardClientError as error:
            error.add_note(f"This was about pairs {start} to {start + len(asked) - 1}.")
            return [lone_item_error(error, asked, start)]
        check_order(reply.pairs, len(asked))
        return [comparison(pair, start + pair.index) for pair in reply.pairs]

    def _slices(
        self,
        groups: Sequence[Mapping[str, Any]],
        slices: Sequence[Slice],
        top_k: int | None,
        tie_below: float,
        until: float,
    ) -> Call[list[Ranked]]:
        asked = [
            {**groups[one.group], "candidates": groups[one.group]["candidates"][one.first : one.stop]} for one in slices
        ]
        whole = len(asked[0]["candidates"]) == len(groups[slices[0].group]["candidates"])
        body = {**self.common(tie_below), "top_k": top_k if whole else None, "prompts": asked}
        try:
            reply = yield from self._request("POST", "/best-of-n", body, BestOfNResponse, until)
        except RewardClientError as error:
            error.add_note(f"This was about groups {slices[0].group} to {slices[-1].group}.")
            return [Ranked(slices[0], lone_item_error(error, asked, slices[0].group, slices[0].first), None)]
        check_order(reply.prompts, len(asked))
        return [
            Ranked(one, ranking(prompt, one.group, one.first), reply.model)
            for one, prompt in zip(slices, reply.prompts, strict=True)
        ]

    def _request(self, method: str, path: str, body: Any, shape: type[_Model], until: float) -> Call[_Model]:
        content = None if body is None else encoded(body)
        attempt = 0
        while True:
            outcome = yield self.send(method, path, content, until)
            if isinstance(outcome, Reply) and outcome.status == 200:
                return parsed(outcome, shape)
            yield from self.pause(outcome, attempt, until)
            attempt += 1


def encoded(body: Any) -> bytes:
    """Returns a body as JSON; ASCII escapes carry even a lone surrogate, which is then the item's error, not a crash."""
    return json.dumps(body, allow_nan=False).encode()


def cut(sizes: Sequence[int], limit: int) -> list[list[Slice]]:
    """Deals groups, in order, into requests of at most `limit` responses; a larger group goes in slices of its own."""
    requests: list[list[Slice]] = []
    room = 0
    for group, size in enumerate(sizes):
        if size > limit:
            requests += [[Slice(group, first, min(first + limit, size))] for first in range(0, size, limit)]
            room = 0
            continue
        if not requests or size > room:
            requests.append([])
            room = limit
        requests[-1].append(Slice(group, 0, size))
        room -= size
    return requests


def rejoined(slices: Sequence[Ranked], top_k: int | None, tie_below: float) -> Ranking | ItemScoreError:
    """Returns the outcome of one group from those of its slices.

    Raises:
        UnexpectedReplyError: Another model answered for some of them.
    """
    if len(slices) == 1:
        return slices[0].outcome
    rewards: list[float] = []
    models = set()
    for one in slices:
        if isinstance(one.outcome, ItemScoreError):
            return one.outcome
        assert one.model is not None
        models.add((one.model.revision, one.model.temperature))
        rewards += rewards_of(one.outcome, one.slice.stop - one.slice.first)
    if len(models) > 1:
        raise UnexpectedReplyError("The model was replaced while its rewards came in. Ask again.")
    ((_, temperature),) = models
    return rank(rewards, temperature, tie_below, top_k)


def _fields(item: PreferencePair | CandidateGroup | Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    if isinstance(item, Mapping):
        return {name: item[name] for name in (*names, "id") if name in item or name != "id"}
    return {name: getattr(item, name) for name in names}
