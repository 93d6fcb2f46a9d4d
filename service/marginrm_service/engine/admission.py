"""How much work may wait for one model, counted in the tokens that it costs. Event loop only, so without locks."""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import Self

from marginrm_service.engine.queue import BULK_FIRST_EVERY
from marginrm_service.errors import OverloadedError, RequestTooLargeError, WouldBeLateError

_KEPT = 0.8  # of the past, with each step, in the measured rate
_LONGEST_WAIT = 60  # seconds; who is told to wait longer than this would rather ask another server
_USABLE = 0.7  # of a deadline: the estimate knows neither tokenising nor the step that runs


class Admission:
    """The door: lets requests in while there is room for them, and while they can be answered in time.

    Args:
        max_tokens: The most tokens that may wait or be computed at a time.
        max_requests: The most requests.
        turn: Tokens that a request may put into a step before it is another one's turn.
    """

    def __init__(self, *, max_tokens: int, max_requests: int, turn: int = 1) -> None:
        self.max_tokens = max_tokens
        self.max_requests = max_requests
        self.tokens = 0
        self.empty = asyncio.Event()  # set while nobody is inside
        self.empty.set()
        self._turn = turn
        self.inside: set[Permit] = set()
        self._computed = 0.0  # tokens and seconds of the last steps, older ones counting less
        self._seconds = 0.0
        self._ended = 0.0  # the last step
        self._backlog = False  # whether work was left when it did

    @property
    def requests(self) -> int:
        """How many are inside."""
        return len(self.inside)

    def enter(self, tokens: int, seconds: float = math.inf, *, bulk: bool = False) -> Permit:
        """Lets a request in.

        Args:
            tokens: What it is expected to cost.
            seconds: Until its deadline.
            bulk: Whether it takes the room that interactive requests leave.

        Returns:
            A permit; use it as a context manager, so that its room is given back.

        Raises:
            OverloadedError, WouldBeLateError: As `check` does.
        """
        self.check(tokens, seconds, bulk=bulk)
        return Permit(self, tokens, bulk=bulk)

    def check(self, tokens: int, seconds: float = math.inf, *, bulk: bool = False) -> None:
        """Returns if `enter` would let this request in.

        Raises:
            OverloadedError: There is no room now.
            WouldBeLateError: By the measured rate it cannot be done in time.
        """
        if self.requests >= self.max_requests or self.tokens + tokens > self.max_tokens:
            raise OverloadedError(
                f"The queue is full ({self.requests:,} requests, {self.tokens:,} tokens).",
                retry_after=self.retry_after(),
            )
        late = self.expected_seconds(tokens, bulk=bulk) - _USABLE * seconds
        # Nobody is told to come again who would find the same then: an idle server tries.
        if late > 0 and self.inside:
            raise WouldBeLateError(
                f"With {self.requests:,} requests before it, this one could not be answered within {seconds:g} s.",
                retry_after=_seconds(late),
            )

    def expected_seconds(self, tokens: int, *, bulk: bool = False) -> float:
        """Returns after how long a request should be done if it came now; 0 before anything was measured.

        Requests take turns, so a short one waits for no more than a few turns of each long one. Bulk work waits for all
        interactive work, and interactive work gives bulk work one step in four.
        """
        if not self._computed:
            return 0.0
        most = max(tokens, self._turn)  # of each other request, that is computed before this one is done
        peers = sum(min(permit.tokens, most) for permit in self.inside if permit.bulk == bulk)
        others = sum(permit.tokens for permit in self.inside if permit.bulk != bulk)
        before: float = tokens + peers
        before += others if bulk else min(others, before / (BULK_FIRST_EVERY - 1))
        return before * self._seconds / self._computed

    def measured(self, tokens: int, seconds: float, *, started: float) -> None:
        """Takes note of a step: how many tokens it computed, how long that took, and when it started.

        While work waits, the time since the last step counts too: what the queue drains at is what is asked for. Steps
        of less than a turn say nothing of it, and are left out.
        """
        pause = started - self._ended if self._backlog else 0.0
        self._ended, self._backlog = started + seconds, self.tokens > 0
        if tokens < self._turn:
            return
        self._computed = _KEPT * self._computed + tokens
        self._seconds = _KEPT * self._seconds + pause + seconds

    def retry_after(self) -> int:
        """Returns the seconds, at least 1, after which half of what waits now should be done."""
        return _seconds(self.tokens / 2 * self._seconds / self._computed) if self._computed else 1


class Permit:
    """A request's place inside; its tokens are given back as they are computed, and the rest when it leaves."""

    def __init__(self, admission: Admission, tokens: int, *, bulk: bool) -> None:
        self._admission = admission
        self.tokens = tokens
        self.bulk = bulk
        admission.tokens += tokens
        admission.inside.add(self)
        admission.empty.clear()

    def settle(self, tokens: int) -> None:
        """Puts the exact cost in the place of the expected one.

        Raises:
            RequestTooLargeError: The queue could not even hold this request alone.
        """
        if tokens > self._admission.max_tokens:
            raise RequestTooLargeError(
                f"This request is {tokens:,} tokens of work, and the queue holds {self._admission.max_tokens:,}. "
                "Send it in several parts."
            )
        self._hold(tokens)

    def _hold(self, tokens: int) -> None:
        self._admission.tokens += tokens - self.tokens
        self.tokens = tokens

    def spend(self, tokens: int) -> None:
        """Gives back the room of tokens that have been computed."""
        self._hold(max(self.tokens - tokens, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hold(0)
        self._admission.inside.discard(self)
        if not self._admission.inside:
            self._admission.empty.set()


def _seconds(exact: float) -> int:
    return min(max(math.ceil(exact), 1), _LONGEST_WAIT)
