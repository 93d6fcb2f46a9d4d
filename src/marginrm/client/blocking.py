"""`RewardClient`: sends what `calls` and `stream` ask for, over `httpx.Client`, and waits for the answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self, TypeVar

import httpx

from marginrm.client.calls import Call, Calls, Group, Pair, Parallel, Send, Wait
from marginrm.client.errors import (
    ItemScoreError,
)
from marginrm.client.options import UNLIMITED, at_least_one, check_deadline, checked_url, default_headers
from marginrm.client.replies import Outcome, Reply
from marginrm.client.stream import Found, Receive, best_of_n_stream
from marginrm.ranking import Comparison, Ranking
from marginrm.schemas import ModelCard
from marginrm.text import Prompt, Truncation

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


class RewardClient:
    """Asks a marginrm server, blocking. Threads may share one client.

    Args:
        base_url: Where the server is, such as `http://127.0.0.1:8000`.
        model: Name of the served model.
        api_key: Sent as a bearer token.
        truncation: What the server does with a sequence that is too long: `error`, or cut the prompt (`prompt_left`).
        timeout: Seconds for each connect, read and write.
        deadline: Seconds for one call with all its requests and retries; no limit by default.
        max_retries: How often a request that may pass is sent again.
        backoff: Seconds before the first retry; doubles with each, up to 8.
        batch_size: Responses in one request, at most: larger calls are cut, and a larger group is ranked here.
        concurrency: Requests of one call at a time, at most.
        transport: An httpx transport of your own: proxies, certificates, an application in the same process.

    Raises:
        ConfigError: The URL or the key cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str = "default",
        api_key: str | None = None,
        truncation: Truncation = "error",
        timeout: float = 60.0,
        deadline: float | None = None,
        max_retries: int = 4,
        backoff: float = 0.25,
        batch_size: int = 256,
        concurrency: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._calls = Calls(
            model=model,
            truncation=truncation,
            timeout=timeout,
            deadline=deadline,
            max_retries=max_retries,
            backoff=backoff,
            batch_size=at_least_one("batch_size", batch_size),
        )
        self._concurrency = at_least_one("concurrency", concurrency)
        self._http = httpx.Client(
            base_url=checked_url(base_url), headers=default_headers(api_key), transport=transport, limits=UNLIMITED
        )

    def score(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        """Returns one reward per response, in order.

        Raises:
            ItemScoreError: The prompt or a response could not be scored.
            RewardClientError: No answer, or a refusal.
        """
        return self._run_all(self._calls.score(prompt, responses))

    def compare(self, prompt: Prompt, chosen: str, rejected: str, *, tie_below: float = 0.5) -> Comparison:
        """Returns margin, confidence and verdict. Raises as `score` does."""
        return self._run_all(self._calls.compare(prompt, chosen, rejected, tie_below))

    def best_of_n(
        self, prompt: Prompt, candidates: Sequence[str], *, top_k: int | None = None, tie_below: float = 0.5
    ) -> Ranking:
        """Ranks candidates, best first. Raises as `score` does."""
        return self._run_all(self._calls.best_of_n(prompt, candidates, top_k, tie_below))

    def score_pairs(self, pairs: Sequence[Pair], *, tie_below: float = 0.5) -> list[Comparison | ItemScoreError]:
        """Compares many pairs.

        Args:
            pairs: `PreferencePair`s, or mappings with `prompt`, `chosen`, `rejected` and perhaps `id`.
            tie_below: Below this confidence both ways a comparison is a tie.

        Returns:
            One outcome per pair, in order; an unusable pair's is its error.

        Raises:
            RewardClientError: No answer, or a refusal.
        """
        return self._run_all(self._calls.score_pairs(pairs, tie_below))

    def best_of_n_many(
        self, groups: Sequence[Group], *, top_k: int | None = None, tie_below: float = 0.5
    ) -> list[Ranking | ItemScoreError]:
        """Ranks the candidates of many prompts (`CandidateGroup`s, or mappings). Else as `score_pairs`."""
        return self._run_all(self._calls.best_of_n_many(groups, top_k, tie_below))

    def best_of_n_stream(
        self, groups: Sequence[Group], *, top_k: int | None = None, tie_below: float = 0.5
    ) -> Iterator[tuple[int, Ranking | ItemScoreError]]:
        """Ranks the candidates of many prompts, and yields each outcome as soon as it is there.

        Yields:
            The group's place among those asked, and its ranking or its error. If the connection breaks, what has not
            come is asked for again.

        Raises:
            RewardClientError: No answer, or a refusal.
        """
        call = best_of_n_stream(self._calls, groups, top_k, tie_below)
        outcome: Outcome | bytes = None
        parts: Iterator[bytes] = iter(())
        with ExitStack() as answer:
            while True:
                try:
                    step = call.send(outcome)
                except StopIteration:
                    return
                outcome = None
                if isinstance(step, Found):
                    yield step.index, step.outcome
                elif isinstance(step, Wait):
                    time.sleep(step.seconds)
                elif isinstance(step, Receive):
                    try:
                        outcome = next(parts, b"")
                    except httpx.HTTPError as error:
                        outcome = error
                else:
                    answer.close()
                    outcome, parts = self._open(step, answer)

    def models(self) -> list[ModelCard]:
        """Returns the served models. Raises as `score_pairs` does."""
        return self._run(self._calls.models())

    def ready(self) -> bool:
        """Returns whether a server answers and is ready; never raises for one that is not."""
        return self._run(self._calls.ready())

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: Call[_Result]) -> _Result:
        outcome: Outcome = None
        try:
            while True:
                step = call.send(outcome)
                if isinstance(step, Wait):
                    time.sleep(step.seconds)
                    outcome = None
                else:
                    outcome = self._send(step)
        except StopIteration as stop:
            result: _Result = stop.value
            return result

    def _run_all(self, parallel: Parallel[_Part, _Result]) -> _Result:
        if len(parallel.calls) < 2:
            return parallel.join([self._run(call) for call in parallel.calls])
        pool = ThreadPoolExecutor(min(self._concurrency, len(parallel.calls)), thread_name_prefix="reward-client")
        try:
            return parallel.join(list(pool.map(self._run, parallel.calls)))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the requests that have not begun are not sent

    def _open(self, step: Send, answer: ExitStack) -> tuple[Reply | httpx.HTTPError, Iterator[bytes]]:
        """Sends a request and leaves a good answer open, for its parts to be taken one by one."""
        try:
            response = answer.enter_context(
                self._http.stream(
                    step.method, step.path, content=step.content, headers=step.headers, timeout=step.timeout
                )
            )
            if response.status_code == 200:
                return Reply(200, response.headers, b""), response.iter_bytes()
            return Reply(response.status_code, response.headers, response.read()), iter(())
        except httpx.HTTPError as error:
            return error, iter(())

    def _send(self, step: Send) -> Reply | httpx.HTTPError:
        try:
            with self._http.stream(
                step.method, step.path, content=step.content, headers=step.headers, timeout=step.timeout
            ) as response:
                parts = []
                for part in response.iter_bytes():
                    parts.append(part)
                    check_deadline(step)
                return Reply(response.status_code, response.headers, b"".join(parts))
        except httpx.HTTPError as error:
            return error
