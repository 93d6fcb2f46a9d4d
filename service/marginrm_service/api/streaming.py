"""Answers in lines of JSON, each sent as soon as it is known (`Accept: application/x-ndjson`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from time import perf_counter
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import TypeAdapter

from marginrm.errors import MarginRMError
from marginrm.schemas import ItemError, PromptOut, StreamEnd, StreamError
from marginrm_service.api.errors import error_body, status_of
from marginrm_service.engine.request import Result
from marginrm_service.models.scoring import OnAsk
from marginrm_service.telemetry.logs import request_id

NDJSON = "application/x-ndjson"
_REFERENCE = "#/components/schemas/{model}"
_ROW = TypeAdapter[Any](PromptOut | ItemError | StreamEnd | StreamError).json_schema(ref_template=_REFERENCE)
# What the OpenAPI document says of a line, and the schemas that it refers to.
SCHEMAS: dict[str, Any] = _ROW.pop("$defs") | {
    "BestOfNRow": _ROW | {"title": "BestOfNRow", "description": "One line of a streamed answer."}
}
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {"content": {NDJSON: {"schema": {"$ref": _REFERENCE.format(model="BestOfNRow")}}}}
}


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """Adds the schemas of lines to an OpenAPI document, which FastAPI makes of whole answers only."""
    document["components"]["schemas"] = SCHEMAS | document["components"]["schemas"]
    return document


def wanted(request: Request) -> bool:
    """Whether a client asks for lines."""
    accepted = request.headers.get("accept", "").split(",")
    return any(kind.partition(";")[0].strip().lower() == NDJSON for kind in accepted)


Line = Callable[[int, list[Result]], Awaitable[str]]
Lines = asyncio.Queue[tuple[int, list[Result]] | None]


async def reply(work: Callable[[OnAsk], Awaitable[str]], line: Line) -> Response:
    """Answers with a line for each ask that work tells of, in the order in which they are done, and a last one.

    A line is made when the client takes it. Until then its results wait, which are fewer bytes than the plain answer.

    Args:
        work: Scores; tells of each ask, and returns the last line.
        line: Makes an ask's line.

    Raises:
        MarginRMError: Work failed before there was a first line, so that it is answered with a status of its own.
    """
    started = perf_counter()
    lines: Lines = asyncio.Queue()

    async def run() -> str:
        try:
            return await work(lambda number, results: lines.put_nowait((number, results)))
        finally:
            lines.put_nowait(None)

    task = asyncio.ensure_future(run())
    task.add_done_callback(_look)
    try:
        first = await lines.get()
        if first is None:
            await task  # raises: there is no request without a prompt
    except BaseException:
        task.cancel()
        raise
    timing = f"first;dur={(perf_counter() - started) * 1000:.2f}"
    return StreamingResponse(_body(first, lines, task, line), media_type=NDJSON, headers={"Server-Timing": timing})


async def _body(
    first: tuple[int, list[Result]] | None, lines: Lines, task: asyncio.Future[str], line: Line
) -> AsyncIterator[str]:
    """Yields what the client is sent; if it goes away, the work ends."""
    try:
        current = first
        while current is not None:
            yield await line(*current) + "\n"
            current = await lines.get()
        try:
            yield await task + "\n"
        except MarginRMError as error:
            body = error_body(error).model_copy(update={"request_id": request_id.get()})
            yield StreamError(status=status_of(error), error=body).model_dump_json() + "\n"
    finally:
        task.cancel()


def _look(task: asyncio.Future[str]) -> None:
    """Asyncio would complain in the log of an error that nobody is left to be told of."""
    if not task.cancelled():
        task.exception()
