"""A Best-of-N call whose rankings arrive one by one, also without I/O. After a broken stream the missing ones are sent again."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import httpx
from pydantic import ValidationError

from marginrm.client.calls import Calls, GroupInput, encoded, split_into_requests
from marginrm.client.errors import ItemScoreError, UnexpectedReplyError
from marginrm.client.protocol import Call, Found, Outcome, Receive, Send, Wait
from marginrm.client.replies import Reply, ranking
from marginrm.ranking import Ranking
from marginrm.schemas import ItemError, PromptOut, StreamEnd, StreamError

NDJSON = "application/x-ndjson"

GroupOutcome = tuple[int, Ranking | ItemScoreError]  # the group's position in the call, and its outcome
Failure = Reply | httpx.HTTPError | None


def best_of_n_stream(
    calls: Calls, groups: Sequence[GroupInput], top_k: int | None, tie_below: float
) -> Call[GroupOutcome]:
    """Ranks many groups in requests of about `batch_size` responses; finds each as soon as the server has it."""
    sent = calls.groups(groups)
    until = calls.until()
    sizes = [min(len(group["candidates"]), calls.batch_size) for group in sent]  # a larger one is sent alone, whole
    for part in split_into_requests(sizes, calls.batch_size):
        missing: dict[int, Mapping[str, Any]] = {one.group: sent[one.group] for one in part}
        attempt = 0
        while missing:
            before = len(missing)
            body = {**calls.common(tie_below), "top_k": top_k, "prompts": list(missing.values())}
            head = yield calls.send("POST", "/best-of-n", encoded(body), until, NDJSON)
            failure = yield from _outcomes(calls, head, missing, until)
            attempt = attempt if len(missing) == before else 0  # progress resets the count of retries
            if failure is not None:
                yield from calls.pause(failure, attempt, until)
                attempt += 1


def _outcomes(
    calls: Calls, head: Outcome, missing: dict[int, Mapping[str, Any]], until: float
) -> Generator[Send | Receive | Wait | Found[GroupOutcome], Outcome, Failure]:
    """Receives the reply to a request and removes the groups that it ranks from `missing`.

    Returns:
        None if the reply was complete, else the refusal or the error that ended it.
    """
    if isinstance(head, httpx.HTTPError):
        return head
    assert isinstance(head, Reply)
    if head.status != 200:
        return (yield from calls.body(head, until))
    return (yield from _lines(missing))


def _lines(
    missing: dict[int, Mapping[str, Any]],
) -> Generator[Receive | Found[GroupOutcome], Outcome, Failure]:
    positions = list(missing)
    rest = b""
    while part := (yield Receive()):
        if not isinstance(part, bytes):
            assert isinstance(part, httpx.HTTPError)
            return part
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            message = _message(line)
            if isinstance(message, StreamEnd):
                return None if not missing else httpx.RemoteProtocolError("the stream ended before its last ranking")
            if isinstance(message, StreamError):
                return Reply(message.status, {}, b'{"error":' + message.error.model_dump_json().encode() + b"}")
            position = positions[message.index] if message.index < len(positions) else -1
            if missing.pop(position, None) is None:
                raise UnexpectedReplyError(f"A line has index {message.index}, which is unknown or was there before.")
            yield Found((position, ranking(message, position)))
    return httpx.RemoteProtocolError("the stream ended before its last line")


def _message(line: bytes) -> PromptOut | ItemError | StreamEnd | StreamError:
    for shape in (PromptOut, ItemError, StreamEnd, StreamError):
        try:
            return shape.model_validate_json(line)
        except ValidationError:
            continue
    raise UnexpectedReplyError("A line is not part of a marginrm stream. Is this the URL of a marginrm server?")
