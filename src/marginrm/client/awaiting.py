"""`AsyncRewardClient`: carries out the steps of `calls` and `stream` with `httpx.AsyncClient`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
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


class AsyncRewardClient:
    """A client of a marginrm server for asyncio. Verbs, arguments and errors are those of `RewardClient`."""

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
        transport: httpx.AsyncBaseTransport | None = None,
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
        self._http = httpx.AsyncClient(
            base_url=checked_url(base_url), headers=default_headers(api_key), transport=transport, limits=UNLIMITED
        )

    async def score(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        """As `RewardClient.score`."""
        return await self._run_all(self._calls.score(prompt, responses))

    async def compare(self, prompt: Prompt, chosen: str, rejected: str, *, tie_below: float = 0.5) -> Comparison:
        """As `RewardClient.compare`."""
        return await self._run_all(self._calls.compare(prompt, chosen, rejected, tie_below))

    async def best_of_n(
        self, prompt: Prompt, candidates: Sequence[str], *, top_k: int | None = None, tie_below: float = 0.5
    ) -> Ranking:
        """As `RewardClient.best_of_n`."""
        return await self._run_all(self._calls.best_of_n(prompt, candidates, top_k, tie_below))

    async def score_pairs(
        self, pairs: Sequence[PairInput], *, tie_below: float = 0.5
    ) -> list[Comparison | ItemScoreError]:
        """As `RewardClient.score_pairs`."""
        return await self._run_all(self._calls.score_pairs(pairs, tie_below))

    async def best_of_n_many(
        self, groups: Sequence[GroupInput], *, top_k: int | None = None, tie_below: float = 0.5
    ) -> list[Ranking | ItemScoreError]:
        """As `RewardClient.best_of_n_many`."""
        return await self._run_all(self._calls.best_of_n_many(groups, top_k, tie_below))

    def best_of_n_stream(
        self, groups: Sequence[GroupInput], *, top_k: int | None = None, tie_below: float = 0.5
    ) -> AsyncIterator[tuple[int, Ranking | ItemScoreError]]:
        """As `RewardClient.best_of_n_stream`."""
        return self._results(best_of_n_stream(self._calls, groups, top_k, tie_below))

    async def models(self) -> list[ModelCard]:
        """As `RewardClient.models`."""
        return await self._run(self._calls.models())

    async def ready(self) -> bool:
        """As `RewardClient.ready`."""
        return await self._run(self._calls.ready())

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: Call[_Result]) -> _Result:
        (result,) = [result async for result in self._results(call)]
        return result

    async def _run_all(self, parallel: Parallel[_Part, _Result]) -> _Result:
        room = asyncio.Semaphore(self._concurrency)

        async def run(call: Call[_Part]) -> _Part:
            async with room:
                return await self._run(call)

        tasks = [asyncio.ensure_future(run(call)) for call in parallel.calls]
        try:
            return parallel.join(list(await asyncio.gather(*tasks)))
        finally:
            for task in tasks:
                task.cancel()

    async def _results(self, call: Call[_Result]) -> AsyncIterator[_Result]:
        """Carries out the steps of a call and yields its results."""
        outcome: Outcome = None
        content: AsyncIterator[bytes] | None = None
        async with AsyncExitStack() as reply:  # closes the reply that is being received
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
                        outcome = await anext(content, b"")
                        continue
                    await reply.aclose()
                    if isinstance(step, Wait):
                        await asyncio.sleep(step.seconds)
                        continue
                    response = await reply.enter_async_context(self._stream(step))
                    outcome, content = Reply(response.status_code, response.headers, b""), response.aiter_bytes()
                except httpx.HTTPError as error:
                    outcome = error

    def _stream(self, step: Send) -> AbstractAsyncContextManager[httpx.Response]:
        return self._http.stream(
            step.method, step.path, content=step.content, headers=step.headers, timeout=step.timeout
        )
