"""NeMo-Gym's resource servers of rewards: `POST /compare` of a prompt's responses, and `POST /verify` of one.

NeMo-Gym's own server asks a generative judge. Here each response has its raw reward, which needs no comparison.
"""

from __future__ import annotations

import statistics
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from marginrm.errors import InvalidTextError
from marginrm.texts.messages import content_text
from marginrm_service.api.adapters.common import ContractReply, ContractRequest, Rewarded, reply, score
from marginrm_service.api.errors import ERROR_REPLIES
from marginrm_service.engine.request import TextGroup
from marginrm_service.state import ServiceOf

router = APIRouter()


class CompareRequest(ContractRequest):
    """A conversation and responses to it. A `principle` is for judges; a reward model has no place for it."""

    conversation_history: list[Any] = Field(min_length=1)
    response_objs: list[Any] = Field(min_length=1, description="Objects of OpenAI's Responses API.")


class CompareResponse(ContractReply):
    """Raw rewards in the order of the request. There are no comparisons to list."""

    rewards: list[float]
    comparison_results: None = None
    metrics: dict[str, float]


class VerifyRequest(ContractRequest):
    """A rollout: its prompt in OpenAI's Responses form, and its response."""

    responses_create_params: dict[str, Any]
    response: dict[str, Any]


class VerifyResponse(VerifyRequest):
    """The rollout, with its raw reward."""

    reward: float


@router.post("/compare", response_model=CompareResponse, responses=ERROR_REPLIES)
async def compare(body: CompareRequest, request: Request, service: ServiceOf) -> Response:
    """Scores the responses of NeMo-Gym's `GenRMStrategy`. An empty answer is scored like any other."""
    answers = [_answer(one, f"response_objs[{index}]") for index, one in enumerate(body.response_objs)]
    rewarded = await score(
        service,
        request,
        None,
        [TextGroup(_messages(body.conversation_history, "conversation_history"), answers, "document")],
        response_at=lambda i: f"response_objs[{i}]",
        prompt_at=lambda _: "conversation_history",
    )
    return await reply(service, rewarded, lambda: CompareResponse(rewards=rewarded.rewards, metrics=_metrics(rewarded)))


@router.post("/verify", response_model=VerifyResponse, responses=ERROR_REPLIES)
async def verify(body: VerifyRequest, request: Request, service: ServiceOf) -> Response:
    """Scores one rollout of NeMo-Gym at once, without waiting for the others of its prompt."""
    where = "responses_create_params.input"
    given = body.responses_create_params.get("input")
    messages = given if isinstance(given, str) else _messages(given, where)
    rewarded = await score(
        service,
        request,
        None,
        [TextGroup(messages, [_answer(body.response, "response")], "document")],
        response_at=lambda _: "response",
        prompt_at=lambda _: where,
    )
    return await reply(
        service,
        rewarded,
        lambda: VerifyResponse(
            responses_create_params=body.responses_create_params, response=body.response, reward=rewarded.rewards[0]
        ),
    )


def _answer(response: Any, where: str) -> str:
    """Returns the final answer of a response object; its reasoning is not scored."""
    output = response.get("output") if isinstance(response, dict) else None
    if not isinstance(output, list):
        raise InvalidTextError('{param} must be an object with a list "output".', param=where)
    messages = [one for one in output if isinstance(one, dict) and one.get("type", "message") == "message"]
    return "".join(content_text(one.get("content"), f"{where}.output") for one in messages)


def _messages(items: Any, where: str) -> list[Any]:
    """Returns the input items of a Responses request as messages."""
    if not isinstance(items, list):
        raise InvalidTextError("{param} must be a text or a list of messages.", param=where)
    return [_message(item) for item in items]


def _message(item: Any) -> Any:
    """Returns an input item without the fields that the Responses API adds to a message."""
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        return item
    role = item.get("role")
    return {"role": "system" if role == "developer" else role, "content": item.get("content")}


def _metrics(rewarded: Rewarded) -> dict[str, float]:
    rewards = rewarded.rewards
    return {
        "mean_individual_score": statistics.fmean(rewards),
        "std_individual_score": statistics.pstdev(rewards),
        "tiebreak_usage_rate": 0.0,
    }
