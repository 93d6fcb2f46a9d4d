"""The native routes: `/score`, `/best-of-n`, `/v1/models`."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from marginrm.errors import MarginRMError
from marginrm.schemas import (
    BestOfNRequest,
    BestOfNResponse,
    ItemError,
    ModelList,
    PairOut,
    PromptOut,
    ScoreRequest,
    ScoreResponse,
    StreamEnd,
)
from marginrm_service.api import scoring_request, streaming
from marginrm_service.api.errors import ERROR_REPLIES, error_response, status_of
from marginrm_service.api.replies import best_of_n_groups, best_of_n_reply, prompt_reply, score_groups, score_reply
from marginrm_service.engine.request import GroupResult, OnGroup, ScoringResult
from marginrm_service.state import Service, ServiceOf

router = APIRouter()


@router.post("/score", response_model=ScoreResponse, responses=ERROR_REPLIES, tags=["scoring"])
async def score(body: ScoreRequest, request: Request, service: ServiceOf) -> Response:
    """Scores preference pairs and single responses.

    A pair gets a margin, reward(chosen) - reward(rejected), and a confidence, the calibrated probability that chosen
    is better. An item that cannot be scored gets an `error` in its place, and its neighbours are scored all the same.
    """
    result = await scoring_request.run(service, request, body.model, score_groups(body), body.truncation)
    reply, response = await scoring_request.respond(service, result, lambda: score_reply(body, result))
    service.metrics.compared(result.model.name, [pair for pair in reply.pairs if isinstance(pair, PairOut)])
    return _lone_error([*reply.pairs, *reply.items], result) or response


@router.post(
    "/best-of-n", response_model=BestOfNResponse, responses=ERROR_REPLIES | streaming.DOCUMENTED, tags=["scoring"]
)
async def best_of_n(body: BestOfNRequest, request: Request, service: ServiceOf) -> Response:
    """Ranks the candidates of one or many prompts, best first.

    The candidates of a prompt share its computation. `p_best` is the probability that a candidate is the best of all,
    `margin` and `confidence` are those of the best over the runner-up. A candidate that cannot be scored is listed
    under `errors`, and the others are ranked without it.

    With `Accept: application/x-ndjson` each prompt's outcome is sent as a line as soon as it is known, and after all of
    them a line with `model` and `usage`. If the rest cannot be scored, the last line has `status` and `error` instead.
    """
    if streaming.wanted(request):
        return await _stream_best_of_n(body, request, service)
    result = await scoring_request.run(service, request, body.model, best_of_n_groups(body), body.truncation)
    reply, response = await scoring_request.respond(service, result, lambda: best_of_n_reply(body, result))
    service.metrics.compared(result.model.name, [prompt for prompt in reply.prompts if isinstance(prompt, PromptOut)])
    return _lone_error(reply.prompts, result) or response


async def _stream_best_of_n(body: BestOfNRequest, request: Request, service: Service) -> Response:
    """Sends each prompt's outcome when it is known."""

    async def line(group: GroupResult) -> str:
        outcome, content = await scoring_request.serialise(
            service, len(group.results), lambda: prompt_reply(group.index, body, group.results, group.model)
        )
        if isinstance(outcome, PromptOut):
            service.metrics.compared(group.model.name, [outcome])
        return content

    async def scored(on_group: OnGroup) -> str:
        groups = best_of_n_groups(body)
        result = await scoring_request.run(service, request, body.model, groups, body.truncation, on_group)
        return StreamEnd(model=result.model, usage=result.usage).model_dump_json()

    return await streaming.reply(scored, line)


@router.get("/v1/models", tags=["models"])
async def models(service: ServiceOf) -> ModelList:
    """Lists the models that are loaded, in OpenAI's shape, with how each computes and whether it is calibrated."""
    return ModelList(data=service.registry.cards())


def _lone_error(outcomes: Sequence[BaseModel], result: ScoringResult) -> Response | None:
    """Returns the error reply to a request whose only item failed, for which a status says more than a 200 would."""
    if len(outcomes) != 1 or not isinstance(outcomes[0], ItemError):
        return None
    body = outcomes[0].error
    error = next(one for one in result.results[0] if isinstance(one, MarginRMError))
    return error_response(status_of(error), body.code, body.message, param=body.param)
