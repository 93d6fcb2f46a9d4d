"""Slime's remote reward model: one sample a request, and a bare number in reply (`slime/rollout/rm_hub/__init__.py`)."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import Field, RootModel

from marginrm.schemas import WirePrompt, WireText
from marginrm_service.api.adapters.common import ContractRequest, reply, score
from marginrm_service.api.errors import ERROR_REPLIES
from marginrm_service.engine.request import TextGroup
from marginrm_service.state import ServiceOf

router = APIRouter()


class SlimeRequest(ContractRequest):
    """A sample; its `label` is not read."""

    prompt: WirePrompt = Field(description="Messages; or, with --apply-chat-template, the rendered prompt.")
    response: WireText = Field(description="The generated text, with or without its end marker.")


class SlimeReward(RootModel[float]):
    """The reward as a bare number. Start slime without `--reward-key`."""


@router.post("/slime", response_model=SlimeReward, responses=ERROR_REPLIES)
async def slime(body: SlimeRequest, request: Request, service: ServiceOf) -> Response:
    """Scores one of slime's samples with `--rm-type remote_rm --rm-url .../slime`.

    A rendered prompt is known by its end, the generation prompt of the model's own template. Both forms of one sample
    get the same reward.
    """
    groups = [TextGroup(body.prompt, [body.response], "generation")]
    rewarded = await score(service, request, None, groups, response_at=lambda _: "response")
    return await reply(service, rewarded, lambda: SlimeReward(rewarded.rewards[0]))
