"""LLaMA-Factory's API of reward models: `POST /v1/score/evaluation` (`src/llamafactory/api/protocol.py`)."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from marginrm.errors import SequenceTooLongError
from marginrm.schemas import WireText
from marginrm_service.api.adapters.common import (
    ContractReply,
    ContractRequest,
    Rewarded,
    new_id,
    reply,
    score,
    templated,
)
from marginrm_service.api.errors import ERROR_REPLIES
from marginrm_service.state import ServiceOf

router = APIRouter()


class ScoreEvaluationRequest(ContractRequest):
    """Templated texts. LLaMA-Factory's own client sends the model name `model` for any model."""

    model: str = "model"
    messages: list[WireText] = Field(min_length=1)
    max_length: int | None = Field(default=None, ge=1, description="A longer text is refused; it is never cut.")


class ScoreEvaluationResponse(ContractReply):
    """Rewards in the order of the request."""

    id: str = Field(default_factory=lambda: new_id("scoreval"))
    object: Literal["score.evaluation"] = "score.evaluation"
    model: str
    scores: list[float]


@router.post("/v1/score/evaluation", response_model=ScoreEvaluationResponse, responses=ERROR_REPLIES)
async def score_evaluation(body: ScoreEvaluationRequest, request: Request, service: ServiceOf) -> Response:
    """Scores LLaMA-Factory's templated texts (`reward_model_type: api`).

    They are decoded generations, so one that was cut off gets its end marker, as those of OpenRLHF do.
    """
    name = "default" if body.model == "model" else body.model
    groups = templated(body.messages, "ended_text")
    rewarded = await score(service, request, name, groups, response_at=lambda i: f"messages[{i}]")
    _check_length(rewarded, body.max_length)
    return await reply(
        service, rewarded, lambda: ScoreEvaluationResponse(model=rewarded.model, scores=rewarded.rewards)
    )


def _check_length(rewarded: Rewarded, limit: int | None) -> None:
    for index, one in enumerate(rewarded.scored):
        if limit is not None and one.tokens > limit:
            raise SequenceTooLongError(
                one.tokens,
                limit,
                f"messages[{index}]: {one.tokens:,} tokens, and max_length is {limit:,}. Texts are never cut on this route.",
                param=f"messages[{index}]",
            )
