"""marginrm over HTTP: `marginrm serve` in a process of its own, and clients that ask at the same time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness.groups import Group
from benchmarks.harness.server import WatchedServer
from benchmarks.reliability.light_client import Wire

_REPLY_SECONDS = 600


class OverHttp:
    """One request a group, from at most `clients` connections.

    Args:
        folder: The model.
        clients: Requests at a time.
        dtype: Of the backbone.
        device: `cpu` or `cuda`.
    """

    def __init__(self, folder: Path, *, clients: int = 16, dtype: str = "auto", device: str = "cpu") -> None:
        arguments = ["--model", str(folder), "--dtype", dtype, "--device", device]
        arguments += ["--reward-cache-mib", "0"]  # every round sends the same texts
        held = ExitStack()  # until this process ends, and with it all that it has started
        logs = held.enter_context(TemporaryDirectory(prefix="marginrm-serve-"))
        self._held, self._server = held, held.enter_context(WatchedServer(arguments, Path(logs, "log")))
        self._loop = asyncio.new_event_loop()
        self._clients = clients
        # It shares the cores with the server, and httpx would take 2 ms of them for each request.
        self._wire = Wire(self._server.url, _REPLY_SECONDS)
        self.computed: int | None = None
        self.detail: dict[str, Any] = {"clients": clients}

    def prepare(self, groups: Sequence[Group]) -> list[tuple[str, bytes]]:
        """Returns one request a group: the route and its body."""
        requests = (_request(group) for group in groups)
        return [(route, json.dumps(body).encode()) for route, body in requests]

    def score(self, work: list[tuple[str, bytes]]) -> list[float]:
        """Sends all requests, `clients` at a time, and reads the rewards."""
        self.computed = 0
        return self._loop.run_until_complete(self._all(work))

    async def _all(self, work: list[tuple[str, bytes]]) -> list[float]:
        replies: list[dict[str, Any]] = [{} for _ in work]
        places = iter(range(len(work)))

        async def client() -> None:
            for place in places:
                route, body = work[place]
                reply = await self._wire.post(route, body)
                if reply.status != HTTPStatus.OK:
                    raise RuntimeError(f"{route} answered {reply.status}: {reply.body.decode()}")
                replies[place] = json.loads(reply.body)

        await asyncio.gather(*(client() for _ in range(self._clients)))
        self.computed = sum(reply["usage"]["tokens_computed"] for reply in replies)
        return [reward for reply in replies for reward in _rewards(reply)]


def _request(group: Group) -> tuple[str, dict[str, Any]]:
    if len(group.responses) == 1:
        return "/score", {"items": [{"prompt": group.prompt, "response": group.responses[0]}]}
    if len(group.responses) == 2:
        chosen, rejected = group.responses
        return "/score", {"pairs": [{"prompt": group.prompt, "chosen": chosen, "rejected": rejected}]}
    return "/best-of-n", {"prompts": [{"prompt": group.prompt, "candidates": list(group.responses)}]}


def _rewards(reply: dict[str, Any]) -> list[float]:
    """Returns the rewards of one group in the order of its responses."""
    if reply.get("items"):
        return [float(reply["items"][0]["reward"])]
    if reply.get("pairs"):
        pair = reply["pairs"][0]
        return [float(pair["chosen"]["reward"]), float(pair["rejected"]["reward"])]
    ranking = sorted(reply["prompts"][0]["ranking"], key=lambda entry: int(entry["candidate"]))
    return [float(entry["reward"]) for entry in ranking]


load = OverHttp
