"""Streamed replies: lines of JSON, each sent as soon as it is known (`Accept: application/x-ndjson`)."""

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
from marginrm_service.engine.request import GroupResult, OnGroup
from marginrm_service.telemetry.logs import request_id

NDJSON = "application/x-ndjson"
_REFERENCE = "#/components/schemas/{model}"
_ROW = TypeAdapter[Any](PromptOut | ItemError | StreamEnd | StreamError).json_schema(ref_template=_REFERENCE)
# The OpenAPI schema of a line, and the schemas that it refers to.
SCHEMAS: dict[str, Any] = _ROW.pop("$defs") | {
    "BestOfNRow": _ROW | {"title": "BestOfNRow", "description": "One line of a streamed reply."}
}
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {"content": {NDJSON: {"schema": {"$ref": _REFERENCE.format(model="BestOfNRow")}}}}
}


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """Adds the schemas of lines to an OpenAPI document; FastAPI adds those of whole replies only."""
    document["components"]["schemas"] = SCHEMAS | document["components"]["schemas"]
    return document


def wanted(request: Request) -> bool:
    """Returns whether the client asks for lines."""
    accepted = request.headers.get("accept", "").split(",")
    return any(kind.partition(";")[0].strip().lower() == NDJSON for kind in accepted)


Line = Callable[[GroupResult], Awaitable[str]]
Groups = asyncio.Queue[GroupResult | None]  # None ends it


async def reply(work: Callable[[OnGroup], Awaitable[str]], line: Line) -> Response:
    """Replies with a line for each group, in the order in which they are complete, and a last line.

    A line is made when the client takes it. Until then its results wait, which take less memory than the plain reply.

    Args:
        work: Scores; it passes on each group, and returns the last line.
        line: Makes the line of a group.

    Raises:
        MarginRMError: The work failed before the first line, so that the reply has a status of its own.
    """
    started = perf_counter()
    groups: Groups = asyncio.Queue()

    async def run() -> str:
        try:
            return await work(groups.put_nowait)
        finally:
            groups.put_nowait(None)

    task = asyncio.ensure_future(run())
    task.add_done_callback(_retrieve_exception)
    try:
        first = await groups.get()
        if first is None:
            await task  # raises, because every request has a group
    except BaseException:
        task.cancel()
        raise
    timing = f"first;dur={(perf_counter() - started) * 1000:.2f}"
    return StreamingResponse(_body(first, groups, task, line), media_type=NDJSON, headers={"Server-Timing": timing})


async def _body(first: GroupResult | None, groups: Groups, task: asyncio.Future[str], line: Line) -> AsyncIterator[str]:
    """Yields the lines; if the client disconnects, the work is cancelled."""
    try:
        group = first
        while group is not None:
            yield await line(group) + "\n"
            group = await groups.get()
        try:
            yield await task + "\n"
        except MarginRMError as error:
            body = error_body(error).model_copy(update={"request_id": request_id.get()})
            yield StreamError(status=status_of(error), error=body).model_dump_json() + "\n"
    finally:
        task.cancel()


def _retrieve_exception(task: asyncio.Future[str]) -> None:
    """Marks the task's exception as retrieved, so that asyncio does not log it after the client has left."""
    if not task.cancelled():
        task.exception()
