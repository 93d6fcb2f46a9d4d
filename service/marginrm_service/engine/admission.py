"""Admission control of one model: how much work may wait, in the tokens that it costs.

Belongs to the event loop, so there are no locks.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

from marginrm_service.engine.queue import BULK_FIRST_EVERY
from marginrm_service.errors import OverloadedError, RequestTooLargeError, WouldBeLateError

_DECAY = 0.8  # of the measured rate, for each later step
_LONGEST_RETRY = 60  # seconds: the largest Retry-After that is sent
_USABLE = 0.7  # share of a deadline; the estimate leaves out tokenising and the step that runs
_SMOOTHING = 0.1  # weight of the newest request in characters per token


class Admission:
    """Admits requests while there is capacity, and while they can be answered before their deadlines.

    Args:
        max_tokens: The most tokens that may wait or be computed at a time.
        max_requests: The most requests.
        quantum: Tokens that a request may add to a step in one turn.

    Attributes:
        tokens: Tokens of all admitted requests that are not computed yet.
        permits: The admitted requests.
    """

    def __init__(self, *, max_tokens: int, max_requests: int, quantum: int = 1) -> None:
        self.max_tokens = max_tokens
        self.max_requests = max_requests
        self.tokens = 0
        self.permits: set[Permit] = set()
        self._quantum = quantum
        self._characters_per_token = 4.0
        self._computed = 0.0  # tokens and seconds of the last steps; older steps have less weight
        self._seconds = 0.0
        self._last_step_ended = 0.0
        self._had_backlog = False  # after the last step

    @property
    def requests(self) -> int:
        """Number of admitted requests."""
        return len(self.permits)

    def acquire(self, tokens: int, seconds: float = math.inf, *, bulk: bool = False) -> Permit:
        """Admits a request.

        Args:
            tokens: Its expected cost.
            seconds: Time until its deadline.
            bulk: It uses the capacity that interactive requests leave.

        Returns:
            A permit; use it as a context manager, so that its capacity is released.

        Raises:
            OverloadedError, WouldBeLateError: As `check_capacity` does.
        """
        self.check_capacity(tokens, seconds, bulk=bulk)
        return Permit(self, tokens, bulk=bulk)

    def check_capacity(self, tokens: int, seconds: float = math.inf, *, bulk: bool = False) -> None:
        """Returns if `acquire` would admit this request.

        Raises:
            OverloadedError: There is no capacity now.
            WouldBeLateError: By the measured rate it cannot be done before its deadline.
        """
        if self.requests >= self.max_requests or self.tokens + tokens > self.max_tokens:
            raise OverloadedError(
                f"The queue is full ({self.requests:,} requests, {self.tokens:,} tokens).",
                retry_after=self.retry_after(),
            )
        late = self.expected_seconds(tokens, bulk=bulk) - _USABLE * seconds
        if late > 0 and self.permits:  # never refuse for lateness when idle: a retry would be refused too
            raise WouldBeLateError(
                f"With {self.requests:,} requests before it, this one could not be answered within {seconds:g} s.",
                retry_after=_whole_seconds(late),
            )

    def check_body(self, size: int, seconds: float, *, bulk: bool) -> None:
        """Returns if there may be capacity for a request of which only the headers are known.

        A request counts as half of the tokens that a text of its body's size would be, and as one quantum at most. So
        it is refused by its size only while the queue is full to within one turn; `acquire` decides by its real cost.

        Args:
            size: Bytes of the body; 0 if the length is unknown.
            seconds: Time until the request's deadline.
            bulk: It uses the capacity that interactive requests leave.

        Raises:
            OverloadedError, WouldBeLateError: As `check_capacity` does.
        """
        least = min(int(size / self._characters_per_token / 2), self._quantum, self.max_tokens)
        self.check_capacity(least, seconds, bulk=bulk)

    def expected_tokens(self, characters: int) -> int:
        """Returns the tokens that a text probably has, by the requests so far; at most `max_tokens`."""
        return min(int(characters / self._characters_per_token), self.max_tokens)

    def observe_characters_per_token(self, characters: int, tokens: int) -> None:
        """Records how many tokens the characters of a request were."""
        if characters and tokens:
            self._characters_per_token += _SMOOTHING * (characters / tokens - self._characters_per_token)

    def expected_seconds(self, tokens: int, *, bulk: bool = False) -> float:
        """Returns the time after which a request that came now should be done; 0 before anything was measured.

        Requests take turns, so a short one waits for a few turns of each long one only. Bulk work waits for all
        interactive work, and interactive work gives bulk work one step in four.
        """
        if not self._computed:
            return 0.0
        most = max(tokens, self._quantum)  # of each other request, that is computed before this one is done
        same_class = sum(min(permit.tokens, most) for permit in self.permits if permit.bulk == bulk)
        other_class = sum(permit.tokens for permit in self.permits if permit.bulk != bulk)
        before: float = tokens + same_class
        before += other_class if bulk else min(other_class, before / (BULK_FIRST_EVERY - 1))
        return before * self._seconds / self._computed

    def observe_step(self, tokens: int, seconds: float, *, started: float) -> None:
        """Records the tokens of a step, its duration, and its start in seconds of `perf_counter`.

        While work waits, the time since the last step counts too, because the rate at which the queue drains is
        wanted. Steps of less than a quantum say little about that rate, and are left out.
        """
        pause = started - self._last_step_ended if self._had_backlog else 0.0
        self._last_step_ended, self._had_backlog = started + seconds, self.tokens > 0
        if tokens < self._quantum:
            return
        self._computed = _DECAY * self._computed + tokens
        self._seconds = _DECAY * self._seconds + pause + seconds

    def retry_after(self) -> int:
        """Returns the seconds, at least 1, after which half of the waiting work should be done."""
        return _whole_seconds(self.tokens / 2 * self._seconds / self._computed) if self._computed else 1


class Permit:
    """The capacity of one admitted request. Tokens are released as they are computed, and the rest at the end."""

    def __init__(self, admission: Admission, tokens: int, *, bulk: bool) -> None:
        self._admission = admission
        self.tokens = tokens
        self.bulk = bulk
        admission.tokens += tokens
        admission.permits.add(self)

    def set_cost(self, tokens: int) -> None:
        """Replaces the expected cost by the exact one.

        Raises:
            RequestTooLargeError: The request alone exceeds the queue.
        """
        if tokens > self._admission.max_tokens:
            raise RequestTooLargeError(
                f"This request is {tokens:,} tokens of work, and the queue holds {self._admission.max_tokens:,}. "
                "Send it in several parts."
            )
        self._hold(tokens)

    def release(self, tokens: int) -> None:
        """Releases the capacity of tokens that have been computed."""
        self._hold(max(self.tokens - tokens, 0))

    def _hold(self, tokens: int) -> None:
        self._admission.tokens += tokens - self.tokens
        self.tokens = tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hold(0)
        self._admission.permits.discard(self)


def _whole_seconds(exact: float) -> int:
    return min(max(math.ceil(exact), 1), _LONGEST_RETRY)
