"""The awaiting client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self, TypeVar

import httpx

from marginrm.client.calls import Call, Calls, Group, Pair, Parallel, Send, Wait
from marginrm.client.errors import ItemScoreError
from marginrm.client.options import UNLIMITED, at_least_one, check_deadline, checked_url, default_headers
from marginrm.client.replies import Outcome, Reply
from marginrm.client.stream import Found, Receive, best_of_n_stream
from marginrm.ranking import Comparison, Ranking
from marginrm.schemas import ModelCard
from marginrm.text import Prompt, Truncation

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


class AsyncRewardClient:
    """Asks a marginrm server from asyncio. Verbs, arguments and errors are those of `RewardClient`, awaited."""

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

    async def score_pairs(self, pairs: Sequence[Pair], *, tie_below: float = 0.5) -> list[Comparison | ItemScoreError]:
        """As `RewardClient.score_pairs`."""
        return await self._run_all(self._calls.score_pairs(pairs, tie_below))

    async def best_of_n_many(
        self, groups: Sequence[Group], *, top_k: int | None = None, tie_below: float = 0.5
    ) -> list[Ranking | ItemScoreError]:
        """As `RewardClient.best_of_n_many`."""
        return await self._run_all(self._calls.best_of_n_many(groups, top_k, tie_below))

    async def best_of_n_stream(
        self, groups: Sequence[Group], *, top_k: int | None = None, tie_below: float = 0.5
    ) -> AsyncIterator[tuple[int, Ranking | ItemScoreError]]:
        """As `RewardClient.best_of_n_stream`."""
        call = best_of_n_stream(self._calls, groups, top_k, tie_below)
        outcome: Outcome | bytes = None
        parts: AsyncIterator[bytes] = _no_parts()
        async with AsyncExitStack() as answer:
            while True:
                try:
                    step = call.send(outcome)
                except StopIteration:
                    return
                outcome = None
                if isinstance(step, Found):
                    yield step.index, step.outcome
                elif isinstance(step, Wait):
                    await asyncio.sleep(step.seconds)
                elif isinstance(step, Receive):
                    try:
                        outcome = await anext(parts, b"")
                    except httpx.HTTPError as error:
                        outcome = error
                else:
                    await answer.aclose()
                    outcome, parts = await self._open(step, answer)

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
        outcome: Outcome = None
        try:
            while True:
                step = call.send(outcome)
                if isinstance(step, Wait):
                    await asyncio.sleep(step.seconds)
                    outcome = None
                else:
                    outcome = await self._send(step)
        except StopIteration as stop:
            result: _Result = stop.value
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

    async def _open(self, step: Send, answer: AsyncExitStack) -> tuple[Reply | httpx.HTTPError, AsyncIterator[bytes]]:
        try:
            response = await answer.enter_async_context(
                self._http.stream(
                    step.method, step.path, content=step.content, headers=step.headers, timeout=step.timeout
                )
            )
            if response.status_code == 200:
                return Reply(200, response.headers, b""), response.aiter_bytes()
            return Reply(response.status_code, response.headers, await response.aread()), _no_parts()
        except httpx.HTTPError as error:
            return error, _no_parts()

    async def _send(self, step: Send) -> Reply | httpx.HTTPError:
        try:
            async with self._http.stream(
                step.method, step.path, content=step.content, headers=step.headers, timeout=step.timeout
            ) as response:
                parts = []
                async for part in response.aiter_bytes():
                    parts.append(part)
                    check_deadline(step)
                return Reply(response.status_code, response.headers, b"".join(parts))
        except httpx.HTTPError as error:
            return error


async def _no_parts() -> AsyncIterator[bytes]:
    nothing: tuple[bytes, ...] = ()
    for part in nothing:
        yield part
