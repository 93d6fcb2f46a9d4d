"""The client's logic without any I/O: each verb is a generator that says what to send and how long to wait.

A call yields `Send` or `Wait` steps, is given back what came of each, and returns the verb's result. `RewardClient` and
`AsyncRewardClient` drive the same calls with a blocking and an awaiting loop. Scoring changes nothing on the server, so
that every request may be sent again.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from marginrm.client_errors import (
    DeadlineError,
    ItemScoreError,
    ResponseError,
    RewardClientError,
    TransportError,
    UnexpectedReplyError,
    response_error,
)
from marginrm.errors import EncodingError, MarginRMError, NonFiniteRewardError
from marginrm.preferences import CandidateGroup, PreferencePair
from marginrm.ranking import Comparison, RankedCandidate, Ranking
from marginrm.schemas import (
    BestOfNResponse,
    ErrorBody,
    ErrorReply,
    ItemError,
    ModelCard,
    ModelList,
    PairOut,
    PromptOut,
    ScoreResponse,
    TruncationPolicy,
)

Prompt = str | Sequence[Mapping[str, str]]
Pair = PreferencePair | Mapping[str, Any]
Group = CandidateGroup | Mapping[str, Any]

# Of errors that are an item's own: a request with one item is answered with its status.
_ITEM_ERRORS: tuple[type[MarginRMError], ...] = (*EncodingError.__subclasses__(), NonFiniteRewardError)
_ITEM_CODES = frozenset(kind.code for kind in _ITEM_ERRORS)
_RETRIED = frozenset({429, 502, 503, 504})
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


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back; the names of `headers` match in any case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


Outcome = Reply | httpx.HTTPError | None  # of a Send: a reply or why none came; of a Wait: None
Result = TypeVar("Result")
Call = Generator[Send | Wait, Outcome, Result]
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Calls:
    """The verbs of one client.

    Attributes:
        model: Name of the served model.
        truncation: What the server does with sequences that are too long.
        timeout: Seconds for each connect, read and write.
        deadline: Seconds for one request with all its retries; None for no limit.
        max_retries: How often a request is sent again.
        backoff: Seconds before the first retry; doubles with each, up to `backoff_max`.
        backoff_max: Seconds.
        batch_size: Responses in one request of a batch verb, at most (a single group may have more).
        clock: Monotonic seconds.
        draw: Gives uniform numbers in [0, 1), for the jitter.
    """

    model: str = "default"
    truncation: TruncationPolicy = "error"
    timeout: float = 60.0
    deadline: float | None = None
    max_retries: int = 4
    backoff: float = 0.25
    backoff_max: float = 8.0
    batch_size: int = 256
    clock: Callable[[], float] = field(default=time.monotonic)
    draw: Callable[[], float] = field(default=random.random)

    def score(self, prompt: Prompt, responses: Sequence[str]) -> Call[list[float]]:
        """One reward per response. Asks `/best-of-n`, where the prompt travels and is computed once."""
        if not responses:
            return []
        ranking = yield from self.best_of_n(prompt, responses, None, 0.5)
        rewards = {ranked.candidate: ranked.reward for ranked in ranking.ranking}
        if sorted(rewards) != list(range(len(responses))):
            raise UnexpectedReplyError(f"Asked for {len(responses)} rewards, got {len(rewards)}.")
        return [rewards[index] for index in range(len(responses))]

    def compare(self, prompt: Prompt, chosen: str, rejected: str, tie_below: float) -> Call[Comparison]:
        """One pair."""
        pairs = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]
        return _or_raise((yield from self.score_pairs(pairs, tie_below))[0])

    def best_of_n(
        self, prompt: Prompt, candidates: Sequence[str], top_k: int | None, tie_below: float
    ) -> Call[Ranking]:
        """One group."""
        groups = [{"prompt": prompt, "candidates": list(candidates)}]
        return _or_raise((yield from self.best_of_n_many(groups, top_k, tie_below))[0])

    def score_pairs(self, pairs: Sequence[Pair], tie_below: float) -> Call[list[Comparison | ItemScoreError]]:
        """Many pairs, in as few requests as `batch_size` allows."""
        results: list[Comparison | ItemScoreError] = []
        size = max(1, self.batch_size // 2)
        for start in range(0, len(pairs), size):
            asked = [_fields(pair, ("prompt", "chosen", "rejected")) for pair in pairs[start : start + size]]
            body = {**self._common(tie_below), "pairs": asked}
            try:
                reply = yield from self._request("POST", "/score", body, ScoreResponse)
            except ResponseError as error:
                results.append(_lone_item_error(error, asked, start))
                continue
            _check_order(reply.pairs, len(asked))
            results.extend(_comparison(pair, start) for pair in reply.pairs)
        return results

    def best_of_n_many(
        self, groups: Sequence[Group], top_k: int | None, tie_below: float
    ) -> Call[list[Ranking | ItemScoreError]]:
        """Many groups, in as few requests as `batch_size` allows."""
        asked = [_fields(group, ("prompt", "candidates")) for group in groups]
        results: list[Ranking | ItemScoreError] = []
        for start, stop in _batches([len(group["candidates"]) for group in asked], self.batch_size):
            body = {**self._common(tie_below), "top_k": top_k, "prompts": asked[start:stop]}
            try:
                reply = yield from self._request("POST", "/best-of-n", body, BestOfNResponse)
            except ResponseError as error:
                results.append(_lone_item_error(error, asked[start:stop], start))
                continue
            _check_order(reply.prompts, stop - start)
            results.extend(_ranking(prompt, start) for prompt in reply.prompts)
        return results

    def models(self) -> Call[list[ModelCard]]:
        """The served models."""
        return (yield from self._request("GET", "/v1/models", None, ModelList)).data

    def ready(self) -> Call[bool]:
        """One look, without retries."""
        outcome = yield self._send("GET", "/readyz", None, self._until())
        return isinstance(outcome, Reply) and outcome.status == 200

    def _common(self, tie_below: float) -> dict[str, Any]:
        return {"model": self.model, "truncation": self.truncation, "tie_below": tie_below}

    def _until(self) -> float:
        return math.inf if self.deadline is None else self.clock() + self.deadline

    def _send(self, method: str, path: str, content: bytes | None, until: float) -> Send:
        left = max(0.001, until - self.clock())
        headers = {"X-Request-Timeout": f"{left:.3f}"} if math.isfinite(left) else {}
        return Send(method, path, content, min(self.timeout, left), until, headers)

    def _request(self, method: str, path: str, body: Any, shape: type[_Model]) -> Call[_Model]:
        # ASCII escapes carry even a lone surrogate, which is then the item's error and not a crash here.
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        until = self._until()
        for attempt in range(self.max_retries + 1):
            outcome = yield self._send(method, path, content, until)
            if isinstance(outcome, Reply) and outcome.status == 200:
                return _parsed(outcome, shape)
            error, wait = _refusal(outcome, attempt + 1)
            if wait is None or attempt == self.max_retries:
                raise error
            backoff = min(self.backoff_max, self.backoff * 2**attempt) * (1 + self.draw()) / 2
            wait = max(wait, backoff)
            late = isinstance(error, TransportError) or error.code == "deadline_exceeded"
            if late and self.clock() + wait >= until:
                raise DeadlineError(f"No answer within {self.deadline:g} s. Last: {error}") from error
            if wait > _LONGEST_WAIT or self.clock() + wait >= until:
                raise error
            yield Wait(wait)
        raise AssertionError("unreachable")  # pragma: no cover


def retry_after(value: str | None) -> float | None:
    """Returns the seconds that a `Retry-After` header asks for, given as seconds or as a date; None if it says nothing."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _refusal(outcome: Outcome, attempts: int) -> tuple[RewardClientError, float | None]:
    """Returns the error that an outcome means, and how long to wait at least before trying again (None: do not)."""
    if isinstance(outcome, Reply):
        asked = retry_after(outcome.headers.get("retry-after"))
        body = _error_body(outcome)
        request_id = body.request_id or outcome.headers.get("x-request-id")
        error = response_error(outcome.status, body.code, body.message, request_id, asked, body.param)
        return error, (asked or 0.0) if outcome.status in _RETRIED else None
    tries = f"{attempts} tries" if attempts > 1 else "1 try"
    failure = TransportError(f"No answer after {tries}: {type(outcome).__name__}: {outcome}")
    failure.__cause__ = outcome
    hopeless = isinstance(outcome, httpx.UnsupportedProtocol | httpx.LocalProtocolError)
    return failure, None if hopeless or not isinstance(outcome, httpx.TransportError) else 0.0


def _error_body(reply: Reply) -> ErrorBody:
    try:
        return ErrorReply.model_validate_json(reply.content).error
    except ValidationError:  # a proxy's page
        return ErrorBody(code="unknown", message="The answer holds no error that a marginrm server writes.")


def _parsed(reply: Reply, shape: type[_Model]) -> _Model:
    try:
        return shape.model_validate_json(reply.content)
    except ValidationError as error:
        raise UnexpectedReplyError(
            f"The answer is no {shape.__name__} ({error.error_count()} faults). Is this the URL of a marginrm server?"
        ) from error


def _check_order(outcomes: Sequence[Any], asked: int) -> None:
    if [outcome.index for outcome in outcomes] != list(range(asked)):
        raise UnexpectedReplyError(f"Asked for {asked} outcomes in order, got {len(outcomes)} in another.")


def _fields(item: PreferencePair | CandidateGroup | Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    if isinstance(item, Mapping):
        return {name: item[name] for name in (*names, "id") if name in item or name != "id"}
    return {name: getattr(item, name) for name in names}


def _batches(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Cuts groups, in order, into ranges of at most `limit` responses; a larger group is alone."""
    ranges, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit:
            ranges.append((start, index))
            start, total = index, 0
        total += size
    return [*ranges, (start, len(sizes))] if sizes else []


def _comparison(outcome: PairOut | ItemError, offset: int) -> Comparison | ItemScoreError:
    if isinstance(outcome, ItemError):
        return _item_error(outcome, offset)
    return Comparison(
        margin=outcome.margin,
        confidence=outcome.confidence,
        verdict=outcome.verdict,
        chosen=outcome.chosen.reward,
        rejected=outcome.rejected.reward,
    )


def _ranking(outcome: PromptOut | ItemError, offset: int) -> Ranking | ItemScoreError:
    if isinstance(outcome, ItemError):
        return _item_error(outcome, offset)
    if outcome.errors:  # a ranking of some candidates is not the one that was asked for
        first = outcome.errors[0]
        param = first.error.param or f"candidates[{first.candidate}]"
        return ItemScoreError(offset + outcome.index, first.error.code, first.error.message, outcome.id, param)
    return Ranking(
        best=outcome.best,
        margin=outcome.margin,
        confidence=outcome.confidence,
        tie=outcome.tie,
        ranking=tuple(RankedCandidate(r.candidate, r.rank, r.reward, r.p_best) for r in outcome.ranking),
        mean=outcome.mean,
        std=outcome.std,
    )


def _item_error(outcome: ItemError, offset: int) -> ItemScoreError:
    error = outcome.error
    return ItemScoreError(offset + outcome.index, error.code, error.message, outcome.id, error.param)


def _lone_item_error(error: ResponseError, asked: Sequence[Mapping[str, Any]], offset: int) -> ItemScoreError:
    """Returns what a refusal says of the only item of a request, for which the server gives a status; else raises it."""
    if len(asked) != 1 or error.code not in _ITEM_CODES:
        raise error
    return ItemScoreError(offset, error.code, error.message, asked[0].get("id"), error.param)


def _or_raise(outcome: Result | ItemScoreError) -> Result:
    if isinstance(outcome, ItemScoreError):
        raise outcome
    return outcome
