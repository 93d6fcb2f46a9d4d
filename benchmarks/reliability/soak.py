"""A long run at 80% of the capacity, with model swaps and disturbing clients; every reward is checked."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from benchmarks.reliability import checks, traffic
from benchmarks.reliability.checks import Outcome
from benchmarks.reliability.light_client import LightClient
from benchmarks.reliability.report import Check, Report
from benchmarks.reliability.server import COMPUTED, WORK, WatchedServer, model_paths, reference
from benchmarks.reliability.traffic import CheckedRequest
from marginrm_service.keys import add_key

_LOAD = 0.8
_SWAP_SECONDS = 20.0
_DISTURBANCES_PER_SECOND = 2.0
_DEADLINE = 30.0  # seconds, sent as X-Request-Timeout; the client waits twice as long
_ALLOWED = (200, 400, 404, 413, 422, 429, 503, 504)

Disturb = Callable[[httpx.AsyncClient, CheckedRequest, random.Random], Awaitable[Outcome]]
Swap = Callable[[httpx.AsyncClient, float], Awaitable[int]]


def soak(minutes: float) -> Report:
    """Runs the server at 80% of its capacity.

    Args:
        minutes: Duration.
    """
    paths = model_paths()
    requests = traffic.checked_requests([reference(path) for path in paths], 64)
    seconds = minutes * 60
    admin = _Admin(WORK)
    arguments = ["--model", str(paths[0]), *COMPUTED, *admin.arguments]
    with WatchedServer(arguments, WORK / "soak.log") as server:
        rate = _LOAD * asyncio.run(traffic.capacity(server.url, requests, min(20.0, seconds)))
        server.rss.clear()
        loaded, sent, disturbed, swaps = asyncio.run(_run(server.url, requests, rate, seconds, _swapping(admin, paths)))
        rss, alive = list(server.rss), server.process.poll() is None
        tracebacks = server.log.count("Traceback")
    checked = sum(outcome.status == 200 for outcome in loaded)
    kinds = Counter((outcome.kind, outcome.status or outcome.fault) for outcome in disturbed)
    facts = {
        "load": f"{rate:.1f} requests/s for {seconds:.0f} s: 80% of the capacity; {sent:,} requests of 8 candidates",
        "model swaps": f"{swaps:,}, one every {_SWAP_SECONDS:g} s",
        "memory at each tenth of the time": checks.memory_course(rss),
        "disturbances": ", ".join(f"{kind} -> {end}: {n:,}" for (kind, end), n in sorted(kinds.items(), key=str)),
    }
    unexpected = [outcome for outcome in disturbed if outcome.fault.startswith(("unexpected", "timeout"))]
    return Report(
        "Soak",
        f"python -m benchmarks.reliability soak --minutes {minutes:g}",
        facts,
        [
            checks.answered_once(loaded, sent),
            checks.right_rewards(loaded, checked),
            checks.only_statuses([*loaded, *disturbed], _ALLOWED),
            Check("disturbing requests end as expected", f"{len(unexpected):,} do not", not unexpected),
            Check("models are swapped meanwhile", f"{swaps:,} swaps", swaps > 0),
            Check("no traceback in the log, and it runs", f"{tracebacks:,}, {alive}", alive and not tracebacks),
            checks.flat_memory(rss, 0.05),
        ],
    )


async def _run(
    url: str, requests: Sequence[CheckedRequest], rate: float, seconds: float, swap: Swap
) -> tuple[list[Outcome], int, list[Outcome], int]:
    """Returns the outcomes of the load, the requests sent, the outcomes of the disturbances, and the swaps."""
    endless = itertools.cycle(requests)
    headers = f"X-Request-Timeout: {_DEADLINE:g}\r\n"
    async with traffic.http_client(url, 60) as http, LightClient(url, 2 * _DEADLINE) as client:
        load = traffic.open_loop(
            lambda planned, start: traffic.send(client, next(endless), planned=planned, start=start, headers=headers),
            rate,
            seconds,
        )
        (loaded, sent), disturbed, swaps = await asyncio.gather(
            load, _disturb(http, requests, seconds), swap(http, seconds)
        )
    return loaded, sent, disturbed, swaps


class _Admin:
    """A client with an admin key, which it writes to a new key file.

    Attributes:
        arguments: The arguments of `marginrm serve` that name the key file.
    """

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        file = work / "admin-keys"
        file.unlink(missing_ok=True)
        self._headers = {"Authorization": f"Bearer {add_key(file, 'soak')}"}
        self.arguments = ["--admin-key-file", str(file)]

    async def swap(self, http: httpx.AsyncClient, path: Path) -> None:
        """Replaces the default model by another checkpoint."""
        body = {"name": "default", "path": str(path)}
        (await http.post("/admin/models", json=body, headers=self._headers)).raise_for_status()


def _swapping(admin: _Admin, paths: tuple[Path, Path]) -> Swap:
    async def swap(http: httpx.AsyncClient, seconds: float) -> int:
        """Alternates between the two models and returns the number of swaps."""
        start, done = time.perf_counter(), 0
        while (done + 1) * _SWAP_SECONDS < seconds:
            await asyncio.sleep(max(0.0, start + (done + 1) * _SWAP_SECONDS - time.perf_counter()))
            await admin.swap(http, paths[(done + 1) % 2])
            done += 1
        return done

    return swap


async def _disturb(http: httpx.AsyncClient, requests: Sequence[CheckedRequest], seconds: float) -> list[Outcome]:
    generator = random.Random(1)

    async def send(planned: float, start: float) -> Outcome:
        disturb = generator.choice(_DISTURBANCES)
        return await disturb(http, generator.choice(requests), generator)

    outcomes, _ = await traffic.open_loop(send, _DISTURBANCES_PER_SECOND, seconds, seed=1)
    return outcomes


async def _cancelled(http: httpx.AsyncClient, request: CheckedRequest, generator: random.Random) -> Outcome:
    """A client that cancels its request after a moment."""
    now = time.perf_counter()
    async with LightClient(str(http.base_url), 60) as client:
        task = asyncio.ensure_future(traffic.send(client, request, planned=now, start=now))
        await asyncio.wait([task], timeout=generator.uniform(0, 0.05))
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
    status = result.status if isinstance(result, Outcome) else None
    return Outcome("cancelled", status, 0.0, "" if status else "gone")


async def _reset(http: httpx.AsyncClient, request: CheckedRequest, generator: random.Random) -> Outcome:
    """A client that resets its connection in the middle of its request, or while it waits for the reply."""
    head = b"POST /best-of-n HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    message = head % len(request.sent) + request.sent
    part = message[: generator.randint(1, len(message))] if generator.random() < 0.5 else message
    parts = urlsplit(str(http.base_url))
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(part)
    await writer.drain()
    await asyncio.sleep(generator.uniform(0, 0.03))
    # Closing with a linger time of 0 s sends a reset.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return Outcome("reset connection", None, 0.0, "gone")


def _invalid(kind: str, body: bytes, expected: int) -> Disturb:
    async def post(http: httpx.AsyncClient, request: CheckedRequest, generator: random.Random) -> Outcome:
        try:
            reply = await http.post("/best-of-n", content=body, headers={"content-type": "application/json"})
        except httpx.WriteError:
            return Outcome(kind, None, 0.0, "closed early")  # a server may refuse a body before it has read all of it
        except httpx.HTTPError as error:
            fault = traffic.transport_fault(error)
            return Outcome(kind, None, 0.0, fault if expected == 413 else f"unexpected {fault}")
        fine = reply.status_code in (expected, 429, 503)
        fault = "" if fine else f"unexpected {reply.status_code}"
        return Outcome(kind, reply.status_code, 0.0, fault, "retry-after" in reply.headers)

    return post


_DISTURBANCES: tuple[Disturb, ...] = (
    _cancelled,
    _reset,
    _invalid("oversized", b"x" * (34 * 2**20), 413),
    _invalid("too long", b'{"prompts":[{"prompt":"%s","candidates":["a"]}]}' % (b"word " * 100_000), 422),
    _invalid("not JSON", b'{"prompts": [', 400),
    _invalid("wrong shape", b'{"prompts": 3}', 422),
    _invalid("unknown model", b'{"model":"no","prompts":[{"prompt":"p","candidates":["a"]}]}', 404),
)
