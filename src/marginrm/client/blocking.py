"""`RewardClient`: carries out the steps of `calls` and `stream` with `httpx.Client`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Self, TypeVar

import httpx

from marginrm.client.calls import Calls, GroupInput, PairInput
from marginrm.client.errors import ItemScoreError
from marginrm.client.options import UNLIMITED, at_least_one, checked_url, default_headers
from marginrm.client.protocol import Call, Found, Outcome, Parallel, Receive, Send, Wait
from marginrm.client.replies import Reply
from marginrm.client.stream import best_of_n_stream
from marginrm.ranking import Comparison, Ranking
from marginrm.schemas import ModelCard
from marginrm.text import Prompt, Truncation

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


class RewardClient:
    """A blocking client of a marginrm server. Threads may share one client.

    Args:
        base_url: Address of the server, such as `http://127.0.0.1:8000`.
        model: Name of the served model.
        api_key: API key, sent as a bearer token.
        truncation: What the server does with a sequence that is too long: `error`, or cut the prompt (`prompt_left`).
        timeout: Seconds for each connect, read and write.
        deadline: Seconds for one call with all its requests and retries; no limit by default.
        max_retries: Most retries of a request that failed for the moment (429, 502, 503, 504 or a broken connection).
        backoff: Seconds before the first retry; doubles with each, up to 8.
        batch_size: Most responses in one request. Larger calls are split, and a larger group is ranked by the client.
        concurrency: Most requests of one call in flight.
        transport: An httpx transport, for proxies, certificates or an application in the same process.

    Raises:
        ConfigError: The URL, the key or a number is not valid.
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
            RewardClientError: The server refused the call or did not answer.
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

    def score_pairs(self, pairs: Sequence[PairInput], *, tie_below: float = 0.5) -> list[Comparison | ItemScoreError]:
        """Compares many pairs.

        Args:
            pairs: `PreferencePair`s, or mappings with `prompt`, `chosen`, `rejected` and optionally `id`.
            tie_below: A comparison is a tie if its confidence is below this in both directions.

        Returns:
            One outcome per pair, in order; that of an unusable pair is its error.

        Raises:
            RewardClientError: The server refused the call or did not answer.
        """
        return self._run_all(self._calls.score_pairs(pairs, tie_below))

    def best_of_n_many(
        self, groups: Sequence[GroupInput], *, top_k: int | None = None, tie_below: float = 0.5
    ) -> list[Ranking | ItemScoreError]:
        """Ranks the candidates of many prompts (`CandidateGroup`s, or mappings). Otherwise as `score_pairs`."""
        return self._run_all(self._calls.best_of_n_many(groups, top_k, tie_below))

    def best_of_n_stream(
        self, groups: Sequence[GroupInput], *, top_k: int | None = None, tie_below: float = 0.5
    ) -> Iterator[tuple[int, Ranking | ItemScoreError]]:
        """Ranks the candidates of many prompts and returns each outcome as soon as it arrives.

        Returns:
            An iterator over each group's position in `groups` and its ranking or error. After a broken connection the
            missing groups are sent again.

        Raises:
            RewardClientError: The server refused the call or did not answer.
        """
        return self._results(best_of_n_stream(self._calls, groups, top_k, tie_below))

    def models(self) -> list[ModelCard]:
        """Returns the served models. Raises as `score_pairs` does."""
        return self._run(self._calls.models())

    def ready(self) -> bool:
        """Returns whether the server answers and is ready. It never raises `RewardClientError`."""
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
        (result,) = self._results(call)
        return result

    def _run_all(self, parallel: Parallel[_Part, _Result]) -> _Result:
        if len(parallel.calls) < 2:
            return parallel.join([self._run(call) for call in parallel.calls])
        pool = ThreadPoolExecutor(min(self._concurrency, len(parallel.calls)), thread_name_prefix="reward-client")
        try:
            return parallel.join(list(pool.map(self._run, parallel.calls)))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, requests that have not started are not sent

    def _results(self, call: Call[_Result]) -> Iterator[_Result]:
        """Carries out the steps of a call and yields its results."""
        outcome: Outcome = None
        content: Iterator[bytes] | None = None
        with ExitStack() as reply:  # closes the reply that is being received
            while True:
                try:
                    step = call.send(outcome)
                except StopIteration:
                    return
                outcome = None
                if isinstance(step, Found):
                    yield step.value
                    continue
                try:
                    if isinstance(step, Receive):
                        assert content is not None
                        outcome = next(content, b"")
                        continue
                    reply.close()
                    if isinstance(step, Wait):
                        time.sleep(step.seconds)
                        continue
                    response = reply.enter_context(self._stream(step))
                    outcome, content = Reply(response.status_code, response.headers, b""), response.iter_bytes()
                except httpx.HTTPError as error:
                    outcome = error

    def _stream(self, step: Send) -> AbstractContextManager[httpx.Response]:
        return self._http.stream(
            step.method, step.path, content=step.content, headers=step.headers, timeout=step.timeout
        )
