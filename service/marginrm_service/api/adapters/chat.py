"""ms-swift's deployed reward models: `POST /v1/chat/completions`, with the reward as the content of the reply."""

from __future__ import annotations

import time
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from marginrm_service.api.adapters.common import (
    ContractReply,
    ContractRequest,
    TokenUsage,
    conversation,
    new_id,
    reply,
    score,
)
from marginrm_service.api.errors import ERROR_REPLIES
from marginrm_service.state import ServiceOf

router = APIRouter()


class ChatCompletionRequest(ContractRequest):
    """One conversation that ends with the response. Options of sampling are ignored, because no text is generated."""

    model: str | None = None
    messages: list[Any] = Field(min_length=1)
    stream: Literal[False] | None = Field(default=None, description="A reward is one value; it is not streamed.")
    n: Literal[1] | None = Field(default=None, description="A conversation has one reward.")


class ChatMessage(ContractReply):
    """The reward as a text, such as `-0.25`."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(ContractReply):
    """The one choice."""

    index: int = 0
    message: ChatMessage
    finish_reason: Literal["stop"] = "stop"
    logprobs: None = None


class ChatUsage(TokenUsage):
    """OpenAI's count of tokens; none is generated."""

    completion_tokens: int = 0


class ChatCompletion(ContractReply):
    """Reply of `/v1/chat/completions`."""

    id: str = Field(default_factory=lambda: new_id("chatcmpl"))
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[Choice]
    usage: ChatUsage


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERROR_REPLIES)
async def chat_completions(body: ChatCompletionRequest, request: Request, service: ServiceOf) -> Response:
    """Scores a conversation; `float(choices[0].message.content)` is the raw reward."""
    rewarded = await score(
        service,
        request,
        body.model,
        [conversation(body.messages)],
        response_at=lambda _: f"messages[{len(body.messages) - 1}]",
        prompt_at=lambda _: "messages",
    )
    return await reply(
        service,
        rewarded,
        lambda: ChatCompletion(
            model=rewarded.model,
            choices=[Choice(message=ChatMessage(content=repr(rewarded.rewards[0])))],
            usage=ChatUsage(**rewarded.usage.model_dump()),
        ),
    )
