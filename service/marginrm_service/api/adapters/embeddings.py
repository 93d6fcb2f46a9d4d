"""SGLang's route for reward models, which verl uses: `POST /v1/embeddings`, with an embedding of one number."""

from __future__ import annotations

import base64
import struct
from typing import Literal

from fastapi import APIRouter, Request, Response

from marginrm_service.api.adapters.common import (
    ContractReply,
    ContractRequest,
    TokenUsage,
    WireTexts,
    reply,
    score,
    templated,
    texts_of,
)
from marginrm_service.api.errors import ERROR_REPLIES
from marginrm_service.state import ServiceOf

router = APIRouter()


class EmbeddingsRequest(ContractRequest):
    """Templated text or texts."""

    model: str | None = None
    input: WireTexts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Literal[1] | None = None


class EmbeddingData(ContractReply):
    """One text's reward, as a vector of one; in base64 it is a little-endian float32, as OpenAI's clients read it."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsResponse(ContractReply):
    """Reply of `/v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[EmbeddingData]
    model: str
    usage: TokenUsage


@router.post("/v1/embeddings", response_model=EmbeddingsResponse, responses=ERROR_REPLIES)
async def embeddings(body: EmbeddingsRequest, request: Request, service: ServiceOf) -> Response:
    """Scores texts; the raw reward is `embedding[-1]`."""
    groups = templated(texts_of(body.input))
    rewarded = await score(service, request, body.model, groups, response_at=lambda i: f"input[{i}]")

    def make() -> EmbeddingsResponse:
        return EmbeddingsResponse(
            data=[
                EmbeddingData(index=i, embedding=[reward] if body.encoding_format == "float" else _packed(reward))
                for i, reward in enumerate(rewarded.rewards)
            ],
            model=rewarded.model,
            usage=rewarded.usage,
        )

    return await reply(service, rewarded, make)


def _packed(reward: float) -> str:
    return base64.b64encode(struct.pack("<f", reward)).decode()
