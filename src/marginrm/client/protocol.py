"""The steps that a call asks its driver for, and how calls become one verb. No I/O here."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import httpx

from marginrm.client.replies import Reply, Result

_Part = TypeVar("_Part")
_Whole = TypeVar("_Whole")
_Other = TypeVar("_Other")


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request and receive the head of its reply: a `Reply` without content, or the error that came instead.

    `timeout` holds for each connect, read and write, in seconds. `headers` tell the server when the caller's time is up,
    so that it can stop late work.
    """

    method: str
    path: str
    content: bytes | None
    timeout: float
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Receive:
    """Receive the next bytes of the reply to the last request; b"" at its end."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for this many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Found(Generic[Result]):
    """A result of the call, for the caller. Nothing is given back."""

    value: Result


# Given back for Send: a reply or an error; for Receive: bytes or an error; else None.
Outcome = Reply | bytes | httpx.HTTPError | None
Exchange = Generator[Send | Receive | Wait, Outcome, Result]  # steps that end with a return value
Call = Generator[Send | Receive | Wait | Found[Result], Outcome, None]


@dataclass(frozen=True, slots=True)
class Parallel(Generic[_Part, _Whole]):
    """Calls of one result each that may run in parallel, and how their results, in order, become one."""

    calls: list[Call[_Part]]
    join: Callable[[list[_Part]], _Whole]

    def then(self, function: Callable[[_Whole], _Other]) -> Parallel[_Part, _Other]:
        """Returns the same calls with a function applied to their joint result."""
        return Parallel(self.calls, lambda parts: function(self.join(parts)))


def finding(exchange: Exchange[Result]) -> Call[Result]:
    """Returns the call whose one result is the return value of an exchange."""
    yield Found((yield from exchange))
