"""A long run at most of the capacity, with models swapped and clients that misbehave; every reward is checked."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from benchmarks.harness.server import WatchedServer
from benchmarks.reliability import checks, setup, traffic
from benchmarks.reliability.admin import Admin
from benchmarks.reliability.checks import Check, Outcome, Report
from benchmarks.reliability.light_client import Wire
from benchmarks.reliability.traffic import Question

_LOAD = 0.8
_SWAP_SECONDS = 20.0
_DISTURBANCES_PER_SECOND = 2.0
_DEADLINE = 30.0  # seconds that a request gives the server, as X-Request-Timeout; its client waits for twice as long
_ALLOWED = (200, 400, 404, 413, 422, 429, 503, 504)

Disturb = Callable[[httpx.AsyncClient, Question, random.Random], Awaitable[Outcome]]


def soak(minutes: float) -> Report:
    """Runs the server at 80% of its capacity.

    Args:
        minutes: How long.
    """
    paths = setup.model_paths()
    asked = traffic.questions([setup.reference(path) for path in paths], 64)
    seconds = minutes * 60
    admin = Admin(setup.WORK)
    arguments = ["--model", str(paths[0]), *setup.COMPUTED, *admin.arguments]
    with WatchedServer(arguments, setup.WORK / "soak.log") as server:
        rate = _LOAD * asyncio.run(traffic.capacity(server.url, asked, min(20.0, seconds)))
        server.rss.clear()
        loaded, sent, disturbed, swaps = asyncio.run(
            _everything(server.url, asked, rate, seconds, partial(_swaps, admin, paths))
        )
        rss, alive = list(server.rss), server.process.poll() is None
        tracebacks = server.log.count("Traceback")
    checked = sum(outcome.status == 200 for outcome in loaded)
    kinds = Counter((outcome.kind, outcome.status or outcome.fault) for outcome in disturbed)
    facts = {
        "load": f"{rate:.1f} requests/s for {seconds:.0f} s: 80% of the capacity; {sent:,} requests of 8 candidates",
        "model swaps": f"{swaps:,}, one every {_SWAP_SECONDS:g} s",
        "memory over the time": checks.memory_course(rss),
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
            Check("disturbing requests end as they should", f"{len(unexpected):,} do not", not unexpected),
            Check("models are swapped while it runs", f"{swaps:,} swaps", swaps > 0),
            Check("no traceback in the log, and it lives", f"{tracebacks:,}, {alive}", alive and not tracebacks),
            checks.flat_memory(rss, 0.05),
        ],
    )


async def _everything(
    url: str,
    asked: Sequence[Question],
    rate: float,
    seconds: float,
    swapping: Callable[[httpx.AsyncClient, float], Awaitable[int]],
) -> tuple[list[Outcome], int, list[Outcome], int]:
    questions = itertools.cycle(asked)
    headers = f"X-Request-Timeout: {_DEADLINE:g}\r\n"
    async with traffic.client(url, 60) as http, Wire(url, 2 * _DEADLINE) as wire:
        load = traffic.open_loop(
            lambda planned, start: traffic.ask(wire, next(questions), planned=planned, start=start, headers=headers),
            rate,
            seconds,
        )
        (loaded, sent), disturbed, swaps = await asyncio.gather(
            load, _disturbances(url, asked, seconds), swapping(http, seconds)
        )
    return loaded, sent, disturbed, swaps


async def _swaps(admin: Admin, paths: tuple[Path, Path], http: httpx.AsyncClient, seconds: float) -> int:
    """Swaps the served model for the other, to and fro; returns how often."""
    start, done = time.perf_counter(), 0
    while (done + 1) * _SWAP_SECONDS < seconds:
        await asyncio.sleep(max(0.0, start + (done + 1) * _SWAP_SECONDS - time.perf_counter()))
        await admin.swap(http, paths[(done + 1) % 2])
        done += 1
    return done


async def _disturbances(url: str, asked: Sequence[Question], seconds: float) -> list[Outcome]:
    generator = random.Random(1)
    async with traffic.client(url, 60) as http:

        async def send(planned: float, start: float) -> Outcome:
            disturb = generator.choice(_DISTURBANCES)
            return await disturb(http, generator.choice(asked), generator)

        outcomes, _ = await traffic.open_loop(send, _DISTURBANCES_PER_SECOND, seconds, seed=1)
    return outcomes


async def _cancelled(http: httpx.AsyncClient, question: Question, generator: random.Random) -> Outcome:
    """A client that gives up after a moment."""
    now = time.perf_counter()
    async with Wire(str(http.base_url), 60) as wire:
        task = asyncio.ensure_future(traffic.ask(wire, question, planned=now, start=now))
        await asyncio.wait([task], timeout=generator.uniform(0, 0.05))
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
    status = result.status if isinstance(result, Outcome) else None
    return Outcome("cancelled", status, 0.0, "" if status else "gone")


async def _killed(http: httpx.AsyncClient, question: Question, generator: random.Random) -> Outcome:
    """A client whose connection is reset in the middle of its request, or while it waits."""
    head = b"POST /best-of-n HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    message = head % len(question.sent) + question.sent
    part = message[: generator.randint(1, len(message))] if generator.random() < 0.5 else message
    parts = urlsplit(str(http.base_url))
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(part)
    await writer.drain()
    await asyncio.sleep(generator.uniform(0, 0.03))
    # Lingering for 0 s makes closing a reset.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return Outcome("killed socket", None, 0.0, "gone")


def _posting(kind: str, body: Callable[[Question], bytes], expected: int) -> Disturb:
    async def post(http: httpx.AsyncClient, question: Question, generator: random.Random) -> Outcome:
        try:
            reply = await http.post("/best-of-n", content=body(question), headers={"content-type": "application/json"})
        except httpx.WriteError:
            return Outcome(kind, None, 0.0, "closed early")  # a server may refuse a body before it has read all of it
        except httpx.HTTPError as error:
            fault = traffic.transport_fault(error)
            return Outcome(kind, None, 0.0, fault if expected == 413 else f"unexpected {fault}")
        fine = reply.status_code in (expected, 429, 503)
        fault = "" if fine else f"unexpected {reply.status_code}"
        return Outcome(kind, reply.status_code, 0.0, fault, "retry-after" in reply.headers)

    return post


def _too_long(question: Question) -> bytes:
    return b'{"prompts":[{"prompt":"%s","candidates":["a"]}]}' % (b"word " * 100_000)


_DISTURBANCES: tuple[Disturb, ...] = (
    _cancelled,
    _killed,
    _posting("oversized", lambda _: b"x" * (34 * 2**20), 413),
    _posting("too long", _too_long, 422),
    _posting("no JSON", lambda _: b'{"prompts": [', 400),
    _posting("wrong shape", lambda _: b'{"prompts": 3}', 422),
    _posting("unknown model", lambda _: b'{"model":"no","prompts":[{"prompt":"p","candidates":["a"]}]}', 404),
)
