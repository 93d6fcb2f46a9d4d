"""How much work may wait for one model, counted in the tokens that it costs. Event loop only, so without locks."""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import Self

from marginrm_service.errors import OverloadedError, RequestTooLargeError

_SMOOTHING = 0.2  # weight of the newest step in the measured rate
_LONGEST_WAIT = 60  # seconds; who is told to wait longer than this would rather ask another server


class Admission:
    """The door: lets requests in while there is room for them.

    Args:
        max_tokens: The most tokens that may wait or be computed at a time.
        max_requests: The most requests.
    """

    def __init__(self, *, max_tokens: int, max_requests: int) -> None:
        self.max_tokens = max_tokens
        self.max_requests = max_requests
        self.tokens = 0
        self.requests = 0
        self.empty = asyncio.Event()  # set while nobody is inside
        self.empty.set()
        self._tokens_per_second: float | None = None

    def enter(self, tokens: int) -> Permit:
        """Lets a request in.

        Args:
            tokens: What it is expected to cost.

        Returns:
            A permit; use it as a context manager, so that its room is given back.

        Raises:
            OverloadedError: There is no room now.
        """
        if self.requests >= self.max_requests or self.tokens + tokens > self.max_tokens:
            raise OverloadedError(
                f"The queue is full ({self.requests:,} requests, {self.tokens:,} tokens).",
                retry_after=self.retry_after(),
            )
        return Permit(self, tokens)

    def measured(self, tokens: int, seconds: float) -> None:
        """Takes note of a step: how many tokens it computed, and how long that took."""
        rate = tokens / max(seconds, 1e-6)
        known = self._tokens_per_second
        self._tokens_per_second = rate if known is None else known + _SMOOTHING * (rate - known)

    def retry_after(self) -> int:
        """Returns the seconds, at least 1, after which half of what waits now should be done."""
        if not self._tokens_per_second:
            return 1
        return min(max(math.ceil(self.tokens / 2 / self._tokens_per_second), 1), _LONGEST_WAIT)


class Permit:
    """A request's place inside; its tokens are given back as they are computed, and the rest when it leaves."""

    def __init__(self, admission: Admission, tokens: int) -> None:
        self._admission = admission
        self._tokens = tokens
        admission.tokens += tokens
        admission.requests += 1
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
        self._admission.tokens += tokens - self._tokens
        self._tokens = tokens

    def spend(self, tokens: int) -> None:
        """Gives back the room of tokens that have been computed."""
        self._hold(max(self._tokens - tokens, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hold(0)
        self._admission.requests -= 1
        if not self._admission.requests:
            self._admission.empty.set()
