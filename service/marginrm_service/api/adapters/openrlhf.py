"""OpenRLHF's remote reward model: `POST /get_reward` (`openrlhf/cli/serve_rm.py`, `openrlhf/utils/agent.py`)."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from marginrm.schemas import WireText
from marginrm_service.api.adapters.common import ContractReply, ContractRequest, reply, score, templated
from marginrm_service.api.errors import ERROR_REPLIES
from marginrm_service.state import ServiceOf

router = APIRouter()


class GetRewardRequest(ContractRequest):
    """Templated texts. OpenRLHF sends `prompts` and `labels` too; like its own server, this one does not read them."""

    query: list[WireText]


class GetRewardResponse(ContractReply):
    """Rewards in the order of the request. `extra_logs` become tensors in the trainer's log."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


@router.post("/get_reward", response_model=GetRewardResponse, responses=ERROR_REPLIES)
async def get_reward(body: GetRewardRequest, request: Request, service: ServiceOf) -> Response:
    """Scores OpenRLHF's templated texts. It sends an empty list to its second URL, and gets empty lists.

    As by OpenRLHF's own server, padding tokens do not count, and a generation that was cut off gets its end marker.
    """
    rewarded = await score(
        service, request, None, templated(body.query, "ended_text"), response_at=lambda i: f"query[{i}]"
    )
    tokens = [float(one.tokens) for one in rewarded.scored]
    return await reply(
        service,
        rewarded,
        lambda: GetRewardResponse(
            rewards=rewarded.rewards, scores=rewarded.rewards, extra_logs={"reward_tokens": tokens}
        ),
    )
