"""A scoring request as all routes run it: under a lease, a deadline and a watch on its connection."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi import Request, Response
from pydantic import BaseModel

from marginrm.text import AnyTruncation
from marginrm_service.api.middleware import tracing
from marginrm_service.api.request_options import RequestOptions, deadline, while_connected
from marginrm_service.engine.request import OnGroup, ScoringRequest, ScoringResult, TextGroup
from marginrm_service.errors import DeadlineExceededError, OverloadedError, UpstreamUnavailableError
from marginrm_service.models import scoring
from marginrm_service.models.served_model import ServedModel
from marginrm_service.state import Service

_LARGE = 256  # responses from which on a reply takes milliseconds to serialise

ReplyT = TypeVar("ReplyT", bound=BaseModel)


async def run(
    service: Service,
    http: Request,
    model_name: str,
    groups: Sequence[TextGroup],
    truncation: AnyTruncation = "error",
    on_group: OnGroup | None = None,
) -> ScoringResult:
    """Scores the groups of a request until its client disconnects or its time is up.

    Args:
        service: The state of the app.
        http: The request, whose body has been read.
        model_name: The model to score with.
        groups: Prompts with their responses.
        truncation: The treatment of sequences above the model's limit.
        on_group: Called with the results of each group as soon as all of them are known.

    Raises:
        UnknownModelError, NotReadyError: As `ModelRegistry.get` does.
        InvalidHeaderError: `X-Request-Timeout` or `X-Priority` is invalid.
        DeadlineExceededError: The time is up.
        ClientGoneError: The client has disconnected.
        UnavailableError, RequestTooLargeError: As `scoring.score` does.
    """
    spent = 0.0
    with contextlib.ExitStack() as lease:
        if service.registry.on_demand(model_name):
            model, spent = await _load(service, http, model_name, lease)
        else:
            model = lease.enter_context(service.registry.lease(model_name))
        options = RequestOptions.of(http, service.settings)
        tenant = "" if service.settings.prefix_cache_shared else options.key_owner
        request = ScoringRequest(groups, truncation, bulk=options.bulk, seconds=options.seconds - spent, tenant=tenant)
        try:
            model.check_upstream()
            async with deadline(options.seconds - spent), while_connected(http):
                result = await scoring.score(model, request, service.pool, on_group)
        except (OverloadedError, DeadlineExceededError, UpstreamUnavailableError) as error:
            service.metrics.rejected(model.name, error.code)
            raise
    service.metrics.scored(result)
    tracing.record(result)
    return result


async def _load(
    service: Service, http: Request, model_name: str, lease: contextlib.ExitStack
) -> tuple[ServedModel, float]:
    """Loads a model on demand and leases it, within the time of the request.

    Returns:
        The model and the seconds that the load took. Another request may have its place by now, so it cannot be looked
        up by name again.
    """
    began = time.monotonic()
    async with deadline(RequestOptions.of(http, service.settings).seconds), while_connected(http):
        model = lease.enter_context(await service.registry.acquire(model_name))
    return model, time.monotonic() - began


async def respond(service: Service, result: ScoringResult, make: Callable[[], ReplyT]) -> tuple[ReplyT, Response]:
    """Makes the reply to a request, and its HTTP response with the header `Server-Timing`."""
    reply, content = await serialise(service, result.usage.responses, make)
    timing = ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in result.timings.by_stage().items())
    return reply, Response(content, media_type="application/json", headers={"Server-Timing": timing})


async def serialise(service: Service, responses: int, make: Callable[[], ReplyT]) -> tuple[ReplyT, str]:
    """Makes a reply and its JSON. The reply to many responses is made in a thread, to keep the event loop free."""

    def run() -> tuple[ReplyT, str]:
        reply = make()
        return reply, reply.model_dump_json()

    if responses < _LARGE:
        return run()
    return await asyncio.get_running_loop().run_in_executor(service.pool, run)
