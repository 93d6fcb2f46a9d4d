"""Load: requests with known rewards, and the outcome of each."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx

from benchmarks.reliability.checks import Outcome
from benchmarks.reliability.light_client import LightClient
from marginrm import RewardModel
from marginrm_training.demo.preferences import generate_groups

_TOLERANCE = 2e-4  # between float32 rewards: the order of summation depends on the batch composition
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # loading certificates takes longer than a request


@dataclass(frozen=True)
class CheckedRequest:
    """A Best-of-N request and its rewards, by the revision of the model."""

    body: dict[str, Any]
    rewards: Mapping[str, Sequence[float]]

    @cached_property
    def sent(self) -> bytes:
        """The encoded body, made once."""
        return json.dumps(self.body).encode()

    def fault(self, reply: Mapping[str, Any]) -> str:
        """Returns the fault of a reply; empty for a correct reply."""
        expected = self.rewards.get(reply["model"]["revision"])
        if expected is None:
            return f"wrong revision {reply['model']['revision']}"
        ranking = sorted(reply["prompts"][0]["ranking"], key=lambda entry: entry["candidate"])
        found = [entry["reward"] for entry in ranking]
        if len(found) != len(expected):
            return f"wrong number of rewards: {len(found)} instead of {len(expected)}"
        off = max(abs(one - other) for one, other in zip(found, expected, strict=True))
        return "" if off <= _TOLERANCE else f"wrong reward, off by {off:.3g}"


def checked_requests(
    models: Sequence[RewardModel], count: int, *, candidates: int = 8, characters: int = 4000
) -> list[CheckedRequest]:
    """Returns requests with texts of the demo and the rewards of each model, computed one request at a time.

    Args:
        models: The reference models.
        count: Number of requests.
        candidates: Candidates of each request.
        characters: The most characters of a candidate.
    """
    groups = generate_groups(0)
    generator = random.Random(0)
    made = []
    for number in range(count):
        group = groups[number % len(groups)]
        texts = [
            text[:characters] for text in generator.sample(group.candidates, min(candidates, len(group.candidates)))
        ]
        rewards = {model.info.revision: model.score(group.prompt, texts) for model in models}
        made.append(CheckedRequest({"prompts": [{"prompt": group.prompt, "candidates": texts}]}, rewards))
    return made


def http_client(url: str, timeout: float) -> httpx.AsyncClient:
    """Returns a client without a limit on connections, so that requests never wait in the client."""
    return httpx.AsyncClient(base_url=url, timeout=timeout, limits=httpx.Limits(max_connections=None), verify=_NO_TLS)


async def send(
    client: LightClient, request: CheckedRequest, *, planned: float, start: float, headers: str = ""
) -> Outcome:
    """Sends one request and checks its reply."""
    at = planned - start
    try:
        reply = await client.post("/best-of-n", request.sent, headers)
    except OSError as error:
        return Outcome("best-of-n", None, time.perf_counter() - planned, transport_fault(error), at=at)
    seconds = time.perf_counter() - planned
    fault = request.fault(json.loads(reply.body)) if reply.status == 200 else ""
    return Outcome("best-of-n", reply.status, seconds, fault, reply.retry_after, at)


def transport_fault(error: Exception) -> str:
    """Returns the fault of a request without a reply: `refused`, `timeout` or `reset (...)`."""
    if isinstance(error, ConnectionRefusedError | httpx.ConnectError):
        return "refused"
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return "timeout"
    return f"reset ({type(error).__name__})"


async def open_loop(
    send: Callable[[float, float], Awaitable[Outcome]], rate: float, seconds: float, seed: int = 0
) -> tuple[list[Outcome], int]:
    """Sends at random times (a Poisson process), without waiting for replies.

    Args:
        send: Sends one request, given its planned time and the start of the run, both of `time.perf_counter`.
        rate: Requests per second.
        seconds: Duration.
        seed: Seed of the times.

    Returns:
        All outcomes, and the number of requests sent.
    """
    generator = random.Random(seed)
    start = planned = time.perf_counter()
    tasks: list[asyncio.Future[Outcome]] = []
    while True:
        planned += generator.expovariate(rate)
        if planned - start > seconds:
            break
        await asyncio.sleep(max(0.0, planned - time.perf_counter()))
        tasks.append(asyncio.ensure_future(send(planned, start)))
    return list(await asyncio.gather(*tasks)), len(tasks)


async def capacity(url: str, requests: Sequence[CheckedRequest], seconds: float, concurrency: int = 16) -> float:
    """Returns the requests per second of clients that each wait for the reply before the next request."""
    done = 0
    end = time.perf_counter() + seconds

    async def send_again(client: LightClient, first: int) -> None:
        nonlocal done
        number = first
        while time.perf_counter() < end:
            now = time.perf_counter()
            outcome = await send(client, requests[number % len(requests)], planned=now, start=now)
            if outcome.status != 200 or outcome.fault:
                raise RuntimeError(f"A request failed without overload: {outcome}")
            done += 1
            number += concurrency

    async with LightClient(url, 120) as client:
        await asyncio.gather(*(send_again(client, index) for index in range(concurrency)))
    return done / seconds
