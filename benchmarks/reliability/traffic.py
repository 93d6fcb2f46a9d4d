"""Requests whose right answers are known, and a client that says what became of each."""

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
from benchmarks.reliability.light_client import Wire
from marginrm import RewardModel
from marginrm_training.demo.preferences import generate_groups

_TOLERANCE = 2e-4  # of a float32 reward against the float32 reference: sums are taken in another order in a crowd
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # each client would load certificates for longer than a request takes


@dataclass(frozen=True)
class Question:
    """A Best-of-N request and its rewards, by the revision of the model that answers."""

    body: dict[str, Any]
    rewards: Mapping[str, Sequence[float]]

    @cached_property
    def sent(self) -> bytes:
        """The body as it is sent, made once."""
        return json.dumps(self.body).encode()

    def fault(self, reply: Mapping[str, Any]) -> str:
        """Returns what is wrong with a reply; empty if nothing is."""
        expected = self.rewards.get(reply["model"]["revision"])
        if expected is None:
            return f"wrong revision {reply['model']['revision']}"
        ranking = sorted(reply["prompts"][0]["ranking"], key=lambda entry: entry["candidate"])
        found = [entry["reward"] for entry in ranking]
        if len(found) != len(expected):
            return f"wrong number of rewards: {len(found)} in place of {len(expected)}"
        off = max(abs(one - other) for one, other in zip(found, expected, strict=True))
        return "" if off <= _TOLERANCE else f"wrong reward, off by {off:.3g}"


def questions(
    models: Sequence[RewardModel], count: int, *, candidates: int = 8, characters: int = 4000
) -> list[Question]:
    """Returns requests over the demo's texts with the rewards of each model, computed one request at a time.

    Args:
        models: What the answers are checked against.
        count: How many requests.
        candidates: Of each request.
        characters: Of each candidate, at most.
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
        made.append(Question({"prompts": [{"prompt": group.prompt, "candidates": texts}]}, rewards))
    return made


def client(url: str, timeout: float) -> httpx.AsyncClient:
    """Returns a client without a limit on connections: waiting in the client is not what is measured."""
    return httpx.AsyncClient(base_url=url, timeout=timeout, limits=httpx.Limits(max_connections=None), verify=_NO_TLS)


async def ask(wire: Wire, question: Question, *, planned: float, start: float, headers: str = "") -> Outcome:
    """Sends one request and checks its answer."""
    at = planned - start
    try:
        reply = await wire.post("/best-of-n", question.sent, headers)
    except OSError as error:
        return Outcome("best-of-n", None, time.perf_counter() - planned, transport_fault(error), at=at)
    seconds = time.perf_counter() - planned
    fault = question.fault(json.loads(reply.body)) if reply.status == 200 else ""
    return Outcome("best-of-n", reply.status, seconds, fault, reply.retry_after, at)


def transport_fault(error: Exception) -> str:
    """Returns what happened to a request that got no answer: refused at the door, reset, or never answered."""
    if isinstance(error, ConnectionRefusedError | httpx.ConnectError):
        return "refused"
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return "timeout"
    return f"reset ({type(error).__name__})"


async def open_loop(
    send: Callable[[float, float], Awaitable[Outcome]], rate: float, seconds: float, seed: int = 0
) -> tuple[list[Outcome], int]:
    """Sends at random times (Poisson), whether or not earlier requests have been answered.

    Args:
        send: Sends one request, given its planned time and the run's start, both of `time.perf_counter`.
        rate: Requests per second.
        seconds: How long.
        seed: Of the times.

    Returns:
        All outcomes, and how many requests were sent.
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


async def capacity(url: str, asked: Sequence[Question], seconds: float, concurrency: int = 16) -> float:
    """Returns the requests per second of clients that each wait for their answer before they ask again."""
    done = 0
    end = time.perf_counter() + seconds

    async def ask_again(wire: Wire, first: int) -> None:
        nonlocal done
        number = first
        while time.perf_counter() < end:
            now = time.perf_counter()
            outcome = await ask(wire, asked[number % len(asked)], planned=now, start=now)
            if outcome.status != 200 or outcome.fault:
                raise RuntimeError(f"An unhurried request failed: {outcome}")
            done += 1
            number += concurrency

    async with Wire(url, 120) as wire:
        await asyncio.gather(*(ask_again(wire, index) for index in range(concurrency)))
    return done / seconds
