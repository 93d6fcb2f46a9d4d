"""What came back from a server, made into results and errors. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from marginrm.client.errors import (
    ItemScoreError,
    ResponseError,
    RewardClientError,
    TransportError,
    UnexpectedReplyError,
    response_error,
)
from marginrm.errors import EncodingError, MarginRMError, NonFiniteRewardError
from marginrm.ranking import Comparison, RankedCandidate, Ranking
from marginrm.schemas import ErrorBody, ErrorReply, ItemError, PairOut, PromptOut

# Of errors that are an item's own: a request with one item is answered with its status.
_ITEM_ERRORS: tuple[type[MarginRMError], ...] = (*EncodingError.__subclasses__(), NonFiniteRewardError)
_ITEM_CODES = frozenset(kind.default_code for kind in _ITEM_ERRORS)
_RETRIED = frozenset({429, 502, 503, 504})

Result = TypeVar("Result")
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back; the names of `headers` match in any case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


Outcome = Reply | httpx.HTTPError | None  # of a Send: a reply or why none came; of a Wait: None


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


def refusal(outcome: Outcome, attempts: int) -> tuple[RewardClientError, float | None]:
    """Returns the error that an outcome means, and how long to wait at least before trying again (None: do not)."""
    if isinstance(outcome, Reply):
        asked = retry_after(outcome.headers.get("retry-after"))
        body = error_body(outcome)
        request_id = body.request_id or outcome.headers.get("x-request-id")
        error = response_error(outcome.status, body.code, body.message, request_id, asked, body.param)
        return error, (asked or 0.0) if outcome.status in _RETRIED else None
    tries = f"{attempts} tries" if attempts > 1 else "1 try"
    failure = TransportError(f"No answer after {tries}: {type(outcome).__name__}: {outcome}")
    failure.__cause__ = outcome
    hopeless = isinstance(outcome, httpx.UnsupportedProtocol | httpx.LocalProtocolError)
    return failure, None if hopeless or not isinstance(outcome, httpx.TransportError) else 0.0


def error_body(reply: Reply) -> ErrorBody:
    """Returns what a refusal says."""
    try:
        return ErrorReply.model_validate_json(reply.content).error
    except ValidationError:  # a proxy's page
        return ErrorBody(code="unknown", message="The answer holds no error that a marginrm server writes.")


def parsed(reply: Reply, shape: type[_Model]) -> _Model:
    """Returns a reply in its shape.

    Raises:
        UnexpectedReplyError: It has another.
    """
    try:
        return shape.model_validate_json(reply.content)
    except ValidationError as error:
        raise UnexpectedReplyError(
            f"The answer is no {shape.__name__} ({error.error_count()} faults). Is this the URL of a marginrm server?"
        ) from error


def check_order(outcomes: Sequence[Any], asked: int) -> None:
    """Raises UnexpectedReplyError unless there is an outcome for each item asked, in order."""
    if [outcome.index for outcome in outcomes] != list(range(asked)):
        raise UnexpectedReplyError(f"Asked for {asked} outcomes in order, got {len(outcomes)} in another.")


def comparison(outcome: PairOut | ItemError, index: int) -> Comparison | ItemScoreError:
    """Returns what came of pair `index` of those asked."""
    if isinstance(outcome, ItemError):
        return item_error(outcome, index)
    return Comparison(
        margin=outcome.margin,
        confidence=outcome.confidence,
        verdict=outcome.verdict,
        chosen=outcome.chosen.reward,
        rejected=outcome.rejected.reward,
    )


def ranking(outcome: PromptOut | ItemError, index: int, first: int = 0) -> Ranking | ItemScoreError:
    """Returns what came of group `index` of those asked; `first` is the candidate that the outcome begins with."""
    if isinstance(outcome, ItemError):
        return item_error(outcome, index)
    if outcome.errors:  # a ranking of some candidates is not the one that was asked for
        fault = outcome.errors[0]
        param = fault.error.param or f"candidates[{first + fault.candidate}]"
        return ItemScoreError(index, fault.error.code, fault.error.message, outcome.id, param)
    return Ranking(
        best=outcome.best,
        margin=outcome.margin,
        confidence=outcome.confidence,
        tie=outcome.tie,
        ranking=tuple(RankedCandidate(r.candidate, r.rank, r.reward, r.p_best) for r in outcome.ranking),
        mean=outcome.mean,
        std=outcome.std,
    )


def rewards_of(ranked: Ranking, asked: int) -> list[float]:
    """Returns the rewards of a whole ranking in the candidates' order.

    Raises:
        UnexpectedReplyError: It does not hold each candidate once.
    """
    rewards = {entry.candidate: entry.reward for entry in ranked.ranking}
    if sorted(rewards) != list(range(asked)):
        raise UnexpectedReplyError(f"Asked for {asked} rewards, got {len(rewards)}.")
    return [rewards[index] for index in range(asked)]


def item_error(outcome: ItemError, index: int) -> ItemScoreError:
    """Returns an item's error under its place among all that were asked."""
    error = outcome.error
    return ItemScoreError(index, error.code, error.message, outcome.id, error.param)


def lone_item_error(
    error: RewardClientError, asked: Sequence[Mapping[str, Any]], index: int, first: int = 0
) -> ItemScoreError:
    """Returns what a refusal says of the only item of a request, for which the server gives a status; else raises it.

    `first` is the candidate that the item begins with, which a refusal of a lone candidate is about.
    """
    if len(asked) != 1 or not isinstance(error, ResponseError) or error.code not in _ITEM_CODES:
        raise error
    param = f"candidates[{first}]" if first else error.param
    return ItemScoreError(index, error.code, error.message, asked[0].get("id"), param)


def or_raise(outcome: Result | ItemScoreError) -> Result:
    """Returns a result, or raises the error in its place."""
    if isinstance(outcome, ItemScoreError):
        raise outcome
    return outcome
