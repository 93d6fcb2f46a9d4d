"""A server's replies -> results and errors. Pure."""

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
from marginrm.process_rewards import StepReward
from marginrm.ranking import Comparison, RankedCandidate, Ranking
from marginrm.schemas import ErrorBody, ErrorReply, ItemError, PairOut, PromptOut, RankedOut, ResponseOut

# Errors of a single item. A request with only that item gets the error as its HTTP status.
_ITEM_ERRORS: tuple[type[MarginRMError], ...] = (*EncodingError.__subclasses__(), NonFiniteRewardError)
_ITEM_CODES = frozenset(kind.default_code for kind in _ITEM_ERRORS)
_RETRIED = frozenset({429, 502, 503, 504})

Result = TypeVar("Result")
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's reply. Names in `headers` match in any case; `content` is empty until it is received."""

    status: int
    headers: Mapping[str, str]
    content: bytes


def retry_after(value: str | None) -> float | None:
    """Returns the seconds of a `Retry-After` header, which holds seconds or a date; None without a valid one."""
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


def refusal(outcome: Reply | httpx.HTTPError, attempts: int) -> tuple[RewardClientError, float | None]:
    """Returns the error of a failed request, and the least wait before a retry in seconds; None if a retry is no use."""
    if isinstance(outcome, Reply):
        delay = retry_after(outcome.headers.get("retry-after"))
        body = error_body(outcome)
        request_id = body.request_id or outcome.headers.get("x-request-id")
        error = response_error(outcome.status, body.code, body.message, request_id, delay, body.param)
        return error, (delay or 0.0) if outcome.status in _RETRIED else None
    tries = f"{attempts} tries" if attempts > 1 else "1 try"
    failure = TransportError(f"No answer after {tries}: {type(outcome).__name__}: {outcome}")
    failure.__cause__ = outcome
    hopeless = isinstance(outcome, httpx.UnsupportedProtocol | httpx.LocalProtocolError)
    return failure, None if hopeless or not isinstance(outcome, httpx.TransportError) else 0.0


def error_body(reply: Reply) -> ErrorBody:
    """Returns the error that a refusal's body describes."""
    try:
        return ErrorReply.model_validate_json(reply.content).error
    except ValidationError:  # a proxy's page
        return ErrorBody(code="unknown", message="The reply is not in the form of a marginrm error.")


def parsed(reply: Reply, shape: type[_Model]) -> _Model:
    """Returns a reply's content, validated.

    Raises:
        UnexpectedReplyError: The content has another shape.
    """
    try:
        return shape.model_validate_json(reply.content)
    except ValidationError as error:
        raise UnexpectedReplyError(
            f"The reply is not a valid {shape.__name__} ({error.error_count()} faults). Is this the URL of a marginrm "
            "server?"
        ) from error


def check_order(outcomes: Sequence[Any], expected: int) -> None:
    """Raises UnexpectedReplyError unless there is one outcome for each item, in order."""
    if [outcome.index for outcome in outcomes] != list(range(expected)):
        raise UnexpectedReplyError(f"Expected {expected} outcomes in order; got {len(outcomes)}, or another order.")


def comparison(outcome: PairOut | ItemError, index: int) -> Comparison | ItemScoreError:
    """Returns the outcome of the pair at position `index` of the call."""
    if isinstance(outcome, ItemError):
        return item_error(outcome, index)
    return Comparison(
        margin=outcome.margin,
        confidence=outcome.confidence,
        verdict=outcome.verdict,
        margin_std=outcome.margin_std,
        chosen=_reward(outcome.chosen),
        rejected=_reward(outcome.rejected),
    )


def _reward(outcome: ResponseOut | RankedOut) -> float:
    """Returns a reward; a process reward model's with the rewards of its steps."""
    return outcome.reward if outcome.steps is None else StepReward(outcome.reward, outcome.steps)


def ranking(outcome: PromptOut | ItemError, index: int, first: int = 0) -> Ranking | ItemScoreError:
    """Returns the outcome of the group at position `index` of the call; its candidates begin at `first`."""
    if isinstance(outcome, ItemError):
        return item_error(outcome, index)
    if outcome.errors:  # the call asked for a ranking of all candidates
        fault = outcome.errors[0]
        param = fault.error.param or f"candidates[{first + fault.candidate}]"
        return ItemScoreError(index, fault.error.code, fault.error.message, outcome.id, param)
    return Ranking(
        best=outcome.best,
        margin=outcome.margin,
        confidence=outcome.confidence,
        tie=outcome.tie,
        ranking=tuple(
            RankedCandidate(r.candidate, r.rank, _reward(r), r.p_best, r.familiarity) for r in outcome.ranking
        ),
        mean=outcome.mean,
        std=outcome.std,
        margin_std=outcome.margin_std,
        confidence_from=outcome.confidence_from or "pairs",
    )


def rewards_of(ranked: Ranking, expected: int) -> list[float]:
    """Returns the rewards of a whole ranking in the candidates' order.

    Raises:
        UnexpectedReplyError: The ranking does not hold each candidate once.
    """
    rewards = {entry.candidate: entry.reward for entry in ranked.ranking}
    if sorted(rewards) != list(range(expected)):
        raise UnexpectedReplyError(f"Expected {expected} rewards, got {len(rewards)}.")
    return [rewards[index] for index in range(expected)]


def item_error(outcome: ItemError, index: int) -> ItemScoreError:
    """Returns an item's error with its position in the call."""
    error = outcome.error
    return ItemScoreError(index, error.code, error.message, outcome.id, error.param)


def lone_item_error(
    error: RewardClientError, sent: Sequence[Mapping[str, Any]], index: int, first: int = 0
) -> ItemScoreError:
    """Turns an HTTP error into an item error if the request had exactly one item and the error's code is about items.

    Any other error is raised again. The item's candidates begin at `first`, which a refusal of a lone candidate is about.
    """
    if len(sent) != 1 or not isinstance(error, ResponseError) or error.code not in _ITEM_CODES:
        raise error
    param = f"candidates[{first}]" if first else error.param
    return ItemScoreError(index, error.code, error.message, sent[0].get("id"), param)


def or_raise(outcome: Result | ItemScoreError) -> Result:
    """Returns a result; an error in its place is raised."""
    if isinstance(outcome, ItemScoreError):
        raise outcome
    return outcome
