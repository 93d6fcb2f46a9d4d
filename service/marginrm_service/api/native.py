"""The native routes: `/score`, `/best-of-n`, `/v1/models`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from marginrm.errors import MarginRMError
from marginrm.schemas import (
    BestOfNRequest,
    BestOfNResponse,
    ErrorReply,
    ItemError,
    ModelList,
    PairOut,
    PromptOut,
    ScoreRequest,
    ScoreResponse,
    StreamEnd,
)
from marginrm.text import Truncation
from marginrm_service.api import streaming
from marginrm_service.api.deadlines import deadline, seconds_allowed
from marginrm_service.api.disconnects import while_connected
from marginrm_service.api.errors import error_response, status_of
from marginrm_service.api.middleware import tracing
from marginrm_service.api.priority import is_bulk
from marginrm_service.api.replies import best_of_n_asks, best_of_n_reply, prompt_reply, score_asks, score_reply
from marginrm_service.engine.request import Answer, Ask, Result, Stages
from marginrm_service.errors import DeadlineExceededError
from marginrm_service.models.scoring import OnAsk
from marginrm_service.models.scoring import score as score_asked
from marginrm_service.models.served_model import ServedModel
from marginrm_service.state import Service, ServiceOf

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "The body is no JSON."},
    404: {"model": ErrorReply, "description": "No model of that name."},
    413: {"model": ErrorReply, "description": "The body, or the work in it, is too large."},
    422: {"model": ErrorReply, "description": "Wrong shape; or the only item's text is unusable."},
    429: {"model": ErrorReply, "description": "The queue is full; try again after `Retry-After` seconds."},
    503: {"model": ErrorReply, "description": "Loading or leaving; try again after `Retry-After` seconds."},
    504: {"model": ErrorReply, "description": "Not done within `X-Request-Timeout` seconds, or the server's default."},
}

_LARGE = 256  # responses from which on a reply takes milliseconds to make

ReplyT = TypeVar("ReplyT", bound=BaseModel)
router = APIRouter()


@router.post("/score", response_model=ScoreResponse, responses=ERRORS, tags=["scoring"])
async def score(body: ScoreRequest, request: Request, service: ServiceOf) -> Response:
    """Scores preference pairs and single responses.

    A pair gets a margin, reward(chosen) - reward(rejected), and a confidence, the calibrated probability that chosen
    is better. An item that cannot be scored gets an `error` in its place, and its neighbours are scored all the same.
    """
    model = service.registry.get(body.model)
    answer = await ask(service, model, request, score_asks(body), body.truncation)
    reply, content = await shape(service, answer.usage.responses, lambda: score_reply(body, answer, model.info))
    service.metrics.comparisons(model.name, [pair for pair in reply.pairs if isinstance(pair, PairOut)])
    return _lone_error([*reply.pairs, *reply.items], answer) or json_reply(content, answer.stages)


@router.post("/best-of-n", response_model=BestOfNResponse, responses=ERRORS | streaming.DOCUMENTED, tags=["scoring"])
async def best_of_n(body: BestOfNRequest, request: Request, service: ServiceOf) -> Response:
    """Ranks the candidates of one or many prompts, best first.

    The candidates of a prompt share its computation. `p_best` is the probability that a candidate is the best of all,
    `margin` and `confidence` are those of the best over the runner-up. A candidate that cannot be scored is listed
    under `errors`, and the others are ranked without it.

    With `Accept: application/x-ndjson` the outcome of each prompt comes as a line of its own as soon as it is known, and
    after the last of them a line with `model` and `usage`. If the rest cannot be done, the last line has `status` and
    `error` instead.
    """
    model = service.registry.get(body.model)
    if streaming.wanted(request):
        return await _stream_best_of_n(body, request, service, model)
    answer = await ask(service, model, request, best_of_n_asks(body), body.truncation)
    reply, content = await shape(service, answer.usage.responses, lambda: best_of_n_reply(body, answer, model.info))
    service.metrics.comparisons(model.name, [prompt for prompt in reply.prompts if isinstance(prompt, PromptOut)])
    return _lone_error(reply.prompts, answer) or json_reply(content, answer.stages)


async def _stream_best_of_n(body: BestOfNRequest, request: Request, service: Service, model: ServedModel) -> Response:
    """Sends each prompt's outcome when it is known."""

    async def line(number: int, results: list[Result]) -> str:
        outcome, content = await shape(service, len(results), lambda: prompt_reply(number, body, results, model.info))
        if isinstance(outcome, PromptOut):
            service.metrics.comparisons(model.name, [outcome])
        return content

    async def scored(on_ask: OnAsk) -> str:
        answer = await ask(service, model, request, best_of_n_asks(body), body.truncation, on_ask)
        return StreamEnd(model=model.info, usage=answer.usage).model_dump_json()

    return await streaming.reply(scored, line)


@router.get("/v1/models", tags=["models"])
async def models(service: ServiceOf) -> ModelList:
    """Lists the models that are loaded, in OpenAI's shape, with how each computes and whether it is calibrated."""
    return ModelList(data=service.registry.cards())


async def ask(
    service: Service,
    model: ServedModel,
    request: Request,
    asks: Sequence[Ask],
    truncation: Truncation,
    on_ask: OnAsk | None = None,
) -> Answer:
    """Scores what a route asks, for as long as its client stays and its time is not up.

    `on_ask` is told of each ask's results as they come.

    Raises:
        DeadlineExceededError: Its time was up.
        InvalidHeaderError: It asks for a time or a priority that is none.
        UnavailableError, RequestTooLargeError: As `scoring.score` does.
    """
    settings = service.settings
    seconds = seconds_allowed(request, settings.request_timeout, settings.max_request_timeout)
    bulk = is_bulk(request)
    try:
        async with deadline(seconds):
            work = score_asked(model, asks, truncation, service.pool, bulk=bulk, seconds=seconds, on_ask=on_ask)
            answer = await while_connected(request, work)
    except DeadlineExceededError as error:
        service.metrics.rejections.labels(model.name, error.code).inc()
        raise
    service.metrics.answer(model.name, answer)
    tracing.record(model.name, answer)
    return answer


async def shape(service: Service, responses: int, make: Callable[[], ReplyT]) -> tuple[ReplyT, str]:
    """Makes a reply and its JSON; those of many responses in a thread, so that the event loop stays free for others."""

    def run() -> tuple[ReplyT, str]:
        reply = make()
        return reply, reply.model_dump_json()

    if responses < _LARGE:
        return run()
    return await asyncio.get_running_loop().run_in_executor(service.pool, run)


def _lone_error(outcomes: Sequence[BaseModel], answer: Answer) -> Response | None:
    """Returns the error reply to a request whose only item failed, where a status says more than a 200 would."""
    if len(outcomes) != 1 or not isinstance(outcomes[0], ItemError):
        return None
    body = outcomes[0].error
    error = next(result for result in answer.results[0] if isinstance(result, MarginRMError))
    return error_response(status_of(error), body.code, body.message, param=body.param)


def json_reply(content: str, stages: Stages) -> Response:
    """Returns a reply that says where its time went."""
    timing = ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in stages.named().items())
    return Response(content, media_type="application/json", headers={"Server-Timing": timing})
