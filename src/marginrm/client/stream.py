"""A Best-of-N job whose rankings come one by one, also without any I/O.

The call of `client_calls` has two more steps: `Receive` the next part of a streamed answer, and `Found`, a result for the
caller. If a stream breaks off, what has not come is asked for again.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import ValidationError

from marginrm.client.calls import Calls, Group, Send, Wait, cut, encoded
from marginrm.client.errors import ItemScoreError, UnexpectedReplyError
from marginrm.client.replies import Outcome, Reply, ranking
from marginrm.ranking import Ranking
from marginrm.schemas import ItemError, PromptOut, StreamEnd, StreamError

NDJSON = "application/x-ndjson"


@dataclass(frozen=True, slots=True)
class Receive:
    """Receive the next part of the answer to the request sent last; nothing when it has ended."""


@dataclass(frozen=True, slots=True)
class Found:
    """A result: the place of a group among those asked, and its outcome."""

    index: int
    outcome: Ranking | ItemScoreError


StreamCall = Generator[Send | Wait | Receive | Found, Outcome | bytes, None]


def best_of_n_stream(calls: Calls, groups: Sequence[Group], top_k: int | None, tie_below: float) -> StreamCall:
    """Ranks many groups; yields each as soon as the server has it, in requests of about `batch_size` responses."""
    asked = calls.groups(groups)
    until = calls.until()
    sizes = [min(len(group["candidates"]), calls.batch_size) for group in asked]  # a larger one goes alone, whole
    for part in cut(sizes, calls.batch_size):
        waiting: dict[int, Mapping[str, Any]] = {one.group: asked[one.group] for one in part}
        attempt = 0
        while waiting:
            before = len(waiting)
            body = {**calls.common(tie_below), "top_k": top_k, "prompts": list(waiting.values())}
            outcome = yield calls.send("POST", "/best-of-n", encoded(body), until, NDJSON)
            assert not isinstance(outcome, bytes)
            if isinstance(outcome, Reply) and outcome.status == 200:
                outcome = yield from _lines(waiting)
            attempt = attempt if len(waiting) == before else 0  # it goes on, so it is worth asking again
            if waiting or outcome is not None:
                yield from calls.pause(outcome, attempt, until)
                attempt += 1


def _lines(waiting: dict[int, Mapping[str, Any]]) -> Generator[Receive | Found, Outcome | bytes, Outcome]:
    """Reads an answer line by line, and takes out of `waiting` what has come.

    Returns:
        None if it came to its end; otherwise what it broke off with.
    """
    numbers = list(waiting)
    rest = b""
    while True:
        part = yield Receive()
        if not isinstance(part, bytes):
            return part
        if not part:
            return httpx.RemoteProtocolError("the stream ended before its last line")
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            message = _message(line)
            if isinstance(message, StreamEnd):
                return None
            if isinstance(message, StreamError):
                return Reply(message.status, {}, b'{"error":' + message.error.model_dump_json().encode() + b"}")
            number = numbers[message.index] if message.index < len(numbers) else -1
            if waiting.pop(number, None) is None:
                raise UnexpectedReplyError(f"A line has index {message.index}, which was not asked for, or has come.")
            yield Found(number, ranking(message, number))


def _message(line: bytes) -> PromptOut | ItemError | StreamEnd | StreamError:
    for shape in (PromptOut, ItemError, StreamEnd, StreamError):
        try:
            return shape.model_validate_json(line)
        except ValidationError:
            continue
    raise UnexpectedReplyError("A line is none that a marginrm server streams. Is this the URL of one?")
