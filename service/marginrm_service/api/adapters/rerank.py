"""Reranking: `/rerank`, `/v1/rerank`, `/v2/rerank` for the clients of Cohere, Jina, vLLM, Infinity and TEI.

The query is the prompt, and each document a candidate response. TEI's requests have `texts` for documents, and its own
reply (`adapters.tei`).

As by Cohere's, Jina's and Infinity's services, a long document is cut, which its result says, and an empty one is scored
like any other. A document that is not a text is left out of the results and listed in `errors`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Discriminator, Field, Tag

from marginrm.errors import MarginRMError
from marginrm.ranking import sigmoid
from marginrm.schemas import ErrorBody, WirePrompt, WireText
from marginrm_service.api.adapters import tei
from marginrm_service.api.adapters.common import (
    ContractReply,
    ContractRequest,
    Rewarded,
    TokenUsage,
    is_unset,
    new_id,
    reply,
    score_each,
    scored_or_raise,
)
from marginrm_service.api.errors import ERROR_REPLIES, error_body
from marginrm_service.engine.request import ScoredResponse, TextGroup
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
    truncate_prompt_tokens: Literal[-1] | None = Field(
        default=None, description="-1 cuts to the model's limit, as the default does; other lengths are refused."
    )
    max_tokens_per_doc: int | None = Field(
        default=None, ge=0, description="Documents are cut to so many tokens; 0 means the model's limit."
    )
    max_chunks_per_doc: None = Field(default=None, description="A document is scored whole; leave it out.")
    rank_fields: None = Field(default=None, description='Documents have one field, "text"; leave it out.')


class Document(ContractReply):
    """A candidate's text."""

    text: WireText


class RerankResult(ContractReply):
    """A candidate's index and reward."""

    index: int
    relevance_score: float
    document: Document | None = Field(default=None, exclude_if=lambda document: document is None)
    truncated: bool = Field(default=False, exclude_if=is_unset, description="True if tokens were cut.")


class DocumentError(ContractReply):
    """A document that could not be scored."""

    index: int
    error: ErrorBody


class RerankResponse(ContractReply):
    """Best first; equal rewards keep the lower index first."""

    id: str = Field(default_factory=lambda: new_id("rerank"))
    model: str
    results: list[RerankResult]
    usage: TokenUsage
    errors: list[DocumentError] = Field(
        default_factory=list, exclude_if=is_unset, description="Documents that could not be scored."
    )


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
    result, found = await score_each(
        service,
        request,
        body.model,
        [TextGroup(body.query, texts, "document", body.max_tokens_per_doc or None)],
        response_at=lambda i: f"documents[{i}]",
        prompt_at=lambda _: "query",
        truncation="longest_first",
    )
    scored = {index: one for index, one in enumerate(found) if isinstance(one, ScoredResponse)}
    if not scored:
        scored_or_raise(found[0])
    rewarded, indices = Rewarded(result, list(scored.values())), list(scored)

    def make() -> RerankResponse:
        ranked = [indices[place] for place in tei.best_first(rewarded.rewards)]
        return RerankResponse(
            model=rewarded.model,
            results=[_result(body, texts, index, scored[index]) for index in ranked[: body.top_n or None]],
            usage=rewarded.usage,
            errors=[
                DocumentError(index=index, error=error_body(one))
                for index, one in enumerate(found)
                if isinstance(one, MarginRMError)
            ],
        )

    return await reply(service, rewarded, make)


def _result(body: RerankRequest, texts: list[Any], index: int, one: ScoredResponse) -> RerankResult:
    return RerankResult(
        index=index,
        relevance_score=sigmoid(one.reward) if body.use_activation else one.reward,
        document=Document(text=texts[index]) if body.return_documents else None,
        truncated=one.truncated,
    )
