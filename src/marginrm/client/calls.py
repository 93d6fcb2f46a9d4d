"""The client's protocol without I/O: each call is a generator of steps that a driver carries out.

A call yields a step, is given what came of it, and yields its results as `Found` steps. A verb is one call, or several
that may run in parallel (`Parallel`). `RewardClient` and `AsyncRewardClient` drive the same calls with a blocking and
an awaiting loop. Scoring changes nothing on the server, so every request may be sent again.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

from marginrm.client.errors import (
    DeadlineError,
    ItemScoreError,
    RewardClientError,
    TransportError,
    UnexpectedReplyError,
)
from marginrm.client.protocol import Call, Exchange, Found, Parallel, Receive, Send, Wait, finding
from marginrm.client.replies import (
    Reply,
    check_order,
    comparison,
    lone_item_error,
    or_raise,
    parsed,
    ranking,
    refusal,
    rewards_of,
)
from marginrm.ranking import Comparison, Ranking, rank
from marginrm.schemas import BestOfNResponse, ModelCard, ModelInfo, ModelList, ScoreResponse
from marginrm.text import Prompt, Truncation
from marginrm.texts.preferences import CandidateGroup, PreferencePair

PairInput = PreferencePair | Mapping[str, Any]
GroupInput = CandidateGroup | Mapping[str, Any]

_Model = TypeVar("_Model", bound=BaseModel)

_LONGEST_WAIT = 60.0  # seconds; a longer Retry-After is left to the caller, who can do other work meanwhile


@dataclass(frozen=True, slots=True)
class CandidateRange:
    """Consecutive candidates of one group: from `first` up to `stop` of group `group`."""

    group: int
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """The outcome of a range of candidates, and the model that ranked it (None where there is no ranking)."""

    part: CandidateRange
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
        """Scores responses to one prompt. It uses `/best-of-n`, where the prompt is sent and computed once."""
        if not responses:
            return Parallel([], lambda _: [])
        return self.best_of_n(prompt, responses, None, 0.5).then(lambda ranked: rewards_of(ranked, len(responses)))

    def compare(
        self, prompt: Prompt, chosen: str, rejected: str, tie_below: float
    ) -> Parallel[list[Comparison | ItemScoreError], Comparison]:
        """Compares two responses."""
        pairs = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]
        return self.score_pairs(pairs, tie_below).then(lambda outcomes: or_raise(outcomes[0]))

    def best_of_n(
        self, prompt: Prompt, candidates: Sequence[str], top_k: int | None, tie_below: float
    ) -> Parallel[list[Ranked], Ranking]:
        """Ranks the candidates of one prompt."""
        groups = [{"prompt": prompt, "candidates": list(candidates)}]
        return self.best_of_n_many(groups, top_k, tie_below).then(lambda outcomes: or_raise(outcomes[0]))

    def score_pairs(
        self, pairs: Sequence[PairInput], tie_below: float
    ) -> Parallel[list[Comparison | ItemScoreError], list[Comparison | ItemScoreError]]:
        """Compares many pairs in as few requests as `batch_size` allows."""
        size = max(1, self.batch_size // 2)
        until = self.until()
        calls = [
            finding(self._compare(pairs[start : start + size], start, tie_below, until))
            for start in range(0, len(pairs), size)
        ]
        return Parallel(calls, lambda parts: [outcome for part in parts for outcome in part])

    def best_of_n_many(
        self, groups: Sequence[GroupInput], top_k: int | None, tie_below: float
    ) -> Parallel[list[Ranked], list[Ranking | ItemScoreError]]:
        """Ranks many groups in as few requests as `batch_size` allows.

        A group larger than that is sent in several requests and ranked here.
        """
        sent = self.groups(groups)
        sizes = [len(group["candidates"]) for group in sent]
        until = self.until()
        calls = [
            finding(self._rank(sent, parts, top_k, tie_below, until))
            for parts in split_into_requests(sizes, self.batch_size)
        ]

        def join(parts: list[list[Ranked]]) -> list[Ranking | ItemScoreError]:
            found: list[list[Ranked]] = [[] for _ in sent]
            for ranked in (one for part in parts for one in part):
                found[ranked.part.group].append(ranked)
            return [rejoined(ranges, top_k, tie_below) for ranges in found]

        return Parallel(calls, join)

    def models(self) -> Call[list[ModelCard]]:
        """Lists the served models."""
        reply = yield from self._request("GET", "/v1/models", None, ModelList, self.until())
        yield Found(reply.data)

    def ready(self) -> Call[bool]:
        """Asks once, without retries, whether the server is ready."""
        outcome = yield from self.exchange("GET", "/readyz", None, self.until())
        yield Found(isinstance(outcome, Reply) and outcome.status == 200)

    def groups(self, groups: Sequence[GroupInput]) -> list[dict[str, Any]]:
        """Returns groups as the server takes them."""
        return [_fields(group, ("prompt", "candidates")) for group in groups]

    def common(self, tie_below: float) -> dict[str, Any]:
        """Returns the fields of every scoring request."""
        return {"model": self.model, "truncation": self.truncation, "tie_below": tie_below}

    def until(self) -> float:
        """Returns the deadline of a verb that begins now, in seconds of `clock`."""
        return math.inf if self.deadline is None else self.clock() + self.deadline

    def send(
        self, method: str, path: str, content: bytes | None, until: float, accept: str = "application/json"
    ) -> Send:
        """Returns the step that sends a request."""
        left = max(0.001, until - self.clock())
        headers = {"Accept": accept} | ({"X-Request-Timeout": f"{left:.3f}"} if math.isfinite(left) else {})
        return Send(method, path, content, min(self.timeout, left), headers)

    def exchange(
        self, method: str, path: str, content: bytes | None, until: float
    ) -> Exchange[Reply | httpx.HTTPError]:
        """Sends a request and receives its whole reply, or returns the error that came instead."""
        head = yield self.send(method, path, content, until)
        if not isinstance(head, Reply):
            assert isinstance(head, httpx.HTTPError)
            return head
        return (yield from self.body(head, until))

    def body(self, head: Reply, until: float) -> Exchange[Reply | httpx.HTTPError]:
        """Receives the content of a reply whose head has come."""
        parts: list[bytes] = []
        while part := (yield Receive()):
            if isinstance(part, httpx.HTTPError):
                return part
            assert isinstance(part, bytes)
            parts.append(part)
            if self.clock() > until:  # the timeout holds for each read, and a slow body has many
                return httpx.ReadTimeout("the reply was still arriving when the deadline passed")
        return Reply(head.status, head.headers, b"".join(parts))

    def pause(self, outcome: Reply | httpx.HTTPError, attempt: int, until: float) -> Exchange[None]:
        """Waits before a failed request is sent again; raises its error if a retry is pointless or too late."""
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

    def _compare(
        self, pairs: Sequence[PairInput], start: int, tie_below: float, until: float
    ) -> Exchange[list[Comparison | ItemScoreError]]:
        sent = [_fields(pair, ("prompt", "chosen", "rejected")) for pair in pairs]
        body = {**self.common(tie_below), "pairs": sent}
        try:
            reply = yield from self._request("POST", "/score", body, ScoreResponse, until)
        except RewardClientError as error:
            error.add_note(f"This was about pairs {start} to {start + len(sent) - 1}.")
            return [lone_item_error(error, sent, start)]
        check_order(reply.pairs, len(sent))
        return [comparison(pair, start + pair.index) for pair in reply.pairs]

    def _rank(
        self,
        groups: Sequence[Mapping[str, Any]],
        parts: Sequence[CandidateRange],
        top_k: int | None,
        tie_below: float,
        until: float,
    ) -> Exchange[list[Ranked]]:
        sent = [
            {**groups[one.group], "candidates": groups[one.group]["candidates"][one.first : one.stop]} for one in parts
        ]
        whole = len(sent[0]["candidates"]) == len(groups[parts[0].group]["candidates"])
        body = {**self.common(tie_below), "top_k": top_k if whole else None, "prompts": sent}
        try:
            reply = yield from self._request("POST", "/best-of-n", body, BestOfNResponse, until)
        except RewardClientError as error:
            error.add_note(f"This was about groups {parts[0].group} to {parts[-1].group}.")
            return [Ranked(parts[0], lone_item_error(error, sent, parts[0].group, parts[0].first), None)]
        check_order(reply.prompts, len(sent))
        return [
            Ranked(one, ranking(prompt, one.group, one.first), reply.model)
            for one, prompt in zip(parts, reply.prompts, strict=True)
        ]

    def _request(self, method: str, path: str, body: Any, shape: type[_Model], until: float) -> Exchange[_Model]:
        content = None if body is None else encoded(body)
        attempt = 0
        while True:
            outcome = yield from self.exchange(method, path, content, until)
            if isinstance(outcome, Reply) and outcome.status == 200:
                return parsed(outcome, shape)
            yield from self.pause(outcome, attempt, until)
            attempt += 1


def encoded(body: Any) -> bytes:
    """Returns a body as JSON. ASCII escapes carry even a lone surrogate, so that the server can refuse that item alone."""
    return json.dumps(body, allow_nan=False).encode()


def split_into_requests(sizes: Sequence[int], limit: int) -> list[list[CandidateRange]]:
    """Splits groups, in order, into requests of at most `limit` responses; a larger group is split into ranges."""
    requests: list[list[CandidateRange]] = []
    room = 0
    for group, size in enumerate(sizes):
        if size > limit:
            requests += [[CandidateRange(group, first, min(first + limit, size))] for first in range(0, size, limit)]
            room = 0
            continue
        if not requests or size > room:
            requests.append([])
            room = limit
        requests[-1].append(CandidateRange(group, 0, size))
        room -= size
    return requests


def rejoined(ranges: Sequence[Ranked], top_k: int | None, tie_below: float) -> Ranking | ItemScoreError:
    """Returns the outcome of one group from those of its ranges.

    Raises:
        UnexpectedReplyError: The ranges were scored by different models.
    """
    if len(ranges) == 1:
        return ranges[0].outcome
    rewards: list[float] = []
    models = set()
    for one in ranges:
        if isinstance(one.outcome, ItemScoreError):
            return one.outcome
        assert one.model is not None
        models.add((one.model.revision, one.model.temperature, one.model.groups))
        rewards += rewards_of(one.outcome, one.part.stop - one.part.first)
    if len(models) > 1:
        raise UnexpectedReplyError("The model was replaced while its rewards came in. Ask again.")
    ((_, temperature, temperatures),) = models
    return rank(rewards, temperature, tie_below, top_k, groups=temperatures)


def _fields(item: PreferencePair | CandidateGroup | Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    if isinstance(item, Mapping):
        return {name: item[name] for name in (*names, "id") if name in item or name != "id"}
    return {name: getattr(item, name) for name in names}
