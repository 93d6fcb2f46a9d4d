"""Reranking: `/rerank`, `/v1/rerank`, `/v2/rerank` for the clients of Cohere, Jina, vLLM, Infinity and TEI.

The query is the prompt, and each document a candidate response. TEI's requests have `texts` for documents, and its own
reply (`adapters.tei`).
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Discriminator, Field, Tag

from marginrm.ranking import sigmoid
from marginrm.schemas import WirePrompt, WireText
from marginrm_service.api.adapters import tei
from marginrm_service.api.adapters.common import (
    ContractReply,
    ContractRequest,
    TokenUsage,
    new_id,
    reply,
    score,
)
from marginrm_service.api.errors import ERROR_REPLIES
from marginrm_service.engine.request import TextGroup
from marginrm_service.state import Service, ServiceOf

router = APIRouter()


class RerankRequest(ContractRequest):
    """A prompt and its candidates."""

    model: str | None = None
    query: WirePrompt
    documents: list[Any] = Field(min_length=1, description='Texts, or objects with a "text".')
    top_n: int | None = Field(default=None, ge=0, description="Results to return; all by default, and for 0.")
    return_documents: bool | None = False
    use_activation: bool | None = Field(default=None, description="True puts a sigmoid on the rewards.")
    # Options that would cut a response are refused, because the reward is read at its end.
    max_tokens_per_doc: None = Field(default=None, description="Responses are never cut; leave it out.")
    max_chunks_per_doc: None = Field(default=None, description="Responses are never cut; leave it out.")
    rank_fields: None = Field(default=None, description='Documents have one field, "text"; leave it out.')


class Document(ContractReply):
    """A candidate's text."""

    text: WireText


class RerankResult(ContractReply):
    """A candidate's index and reward."""

    index: int
    relevance_score: float
    document: Document | None = Field(default=None, exclude_if=lambda document: document is None)


class RerankResponse(ContractReply):
    """Best first; equal rewards keep the lower index first."""

    id: str = Field(default_factory=lambda: new_id("rerank"))
    model: str
    results: list[RerankResult]
    usage: TokenUsage


@router.post("/v1/rerank", response_model=RerankResponse, responses=ERROR_REPLIES)
@router.post("/v2/rerank", response_model=RerankResponse, responses=ERROR_REPLIES)
async def rerank(body: RerankRequest, request: Request, service: ServiceOf) -> Response:
    """Ranks documents by raw reward, in the shape that Cohere, Jina and vLLM share."""
    return await _rerank(body, request, service)


def _contract(body: Any) -> str:
    return "tei" if isinstance(body, dict) and "texts" in body else "rerank"


EitherRequest = Annotated[
    Annotated[RerankRequest, Tag("rerank")] | Annotated[tei.TeiRerankRequest, Tag("tei")], Discriminator(_contract)
]


@router.post("/rerank", response_model=RerankResponse | tei.TeiRerankResponse, responses=ERROR_REPLIES)
async def rerank_or_tei(body: EitherRequest, request: Request, service: ServiceOf) -> Response:
    """Ranks `documents` as `/v1/rerank` does, or TEI's `texts` in TEI's shape."""
    if isinstance(body, tei.TeiRerankRequest):
        return await tei.rerank(body, request, service)
    return await _rerank(body, request, service)


async def _rerank(body: RerankRequest, request: Request, service: Service) -> Response:
    texts = [document.get("text") if isinstance(document, dict) else document for document in body.documents]
    rewarded = await score(
        service,
        request,
        body.model,
        [TextGroup(body.query, texts)],
        response_at=lambda i: f"documents[{i}]",
        prompt_at=lambda _: "query",
    )

    def make() -> RerankResponse:
        rewards = rewarded.rewards
        return RerankResponse(
            model=rewarded.model,
            results=[
                RerankResult(
                    index=index,
                    relevance_score=sigmoid(rewards[index]) if body.use_activation else rewards[index],
                    document=Document(text=texts[index]) if body.return_documents else None,
                )
                for index in tei.best_first(rewards)[: body.top_n or None]
            ],
            usage=rewarded.usage,
        )

    return await reply(service, rewarded, make)
