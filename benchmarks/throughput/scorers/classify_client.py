"""Requests to `/classify`, one response each, as RL trainers send them; the same bytes go to marginrm and to vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from transformers import AutoTokenizer

from benchmarks.harness.texts import Sample, TokenizedGroup

REPLY_SECONDS = 600.0
_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


@dataclass(frozen=True, slots=True)
class Requests:
    """The bodies of a sample's requests.

    Attributes:
        sequences: Bodies; within a sequence each waits for the reply to the one before.
        clients: Sequences in flight.
    """

    sequences: list[list[bytes]]
    clients: int


class ClassifyClient:
    """Sends a sample's responses to `/classify`, one in a request.

    Args:
        url: The server.
        folder: The model's folder, for its chat template.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Content-Type": "application/json"},
            timeout=REPLY_SECONDS,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def requests(self, sample: Sample) -> Requests:
        """Returns the bodies for a sample whose groups have one response each."""
        bodies = [json.dumps({"input": self._text(group), "use_activation": False}).encode() for group in sample.groups]
        starts = range(0, len(bodies), sample.turns)
        return Requests([bodies[start : start + sample.turns] for start in starts], sample.clients)

    async def rewards(self, requests: Requests) -> list[float]:
        """Sends the requests and returns the rewards in their order."""
        return await send_all(requests.sequences, self._reward, requests.clients)

    async def _reward(self, body: bytes) -> float:
        reply = await self._http.post("/classify", content=body)
        if reply.status_code != httpx.codes.OK:
            raise RuntimeError(f"/classify replied {reply.status_code}: {reply.text}")
        return float(reply.json()["data"][0]["probs"][0])

    def _text(self, group: TokenizedGroup) -> str:
        """Returns prompt and response in the model's chat template."""
        messages = [{"role": "user", "content": group.prompt}] if isinstance(group.prompt, str) else group.prompt
        (response,) = group.responses
        text: str = self._tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": response}], tokenize=False
        )
        return text


async def send_all(
    sequences: Sequence[Sequence[_Request]], send: Callable[[_Request], Awaitable[_Reply]], clients: int
) -> list[_Reply]:
    """Sends all requests and returns the replies in their order.

    Args:
        sequences: Requests; within a sequence each waits for the reply to the one before.
        send: Sends one request and returns its reply.
        clients: Sequences in flight.
    """
    replies: list[list[_Reply]] = [[] for _ in sequences]
    waiting = iter(range(len(sequences)))

    async def client() -> None:
        for number in waiting:
            for request in sequences[number]:
                replies[number].append(await send(request))

    await asyncio.gather(*(client() for _ in range(clients)))
    return [reply for sequence in replies for reply in sequence]
