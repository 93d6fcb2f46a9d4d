"""Results -> the wire shapes of `/score` and `/best-of-n`. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from marginrm import ranking
from marginrm.errors import EncodingError, MarginRMError
from marginrm.schemas import (
    BestOfNRequest,
    BestOfNResponse,
    CandidateError,
    ErrorBody,
    ItemError,
    ItemIn,
    ItemOut,
    ModelInfo,
    PairIn,
    PairOut,
    PromptOut,
    RankedOut,
    ResponseOut,
    ScoreRequest,
    ScoreResponse,
)
from marginrm_service.api.errors import error_body
from marginrm_service.engine.request import Answer, Ask, Result, Scored


def score_asks(request: ScoreRequest) -> list[Ask]:
    """Returns what `/score` asks: its pairs first, then its items."""
    pairs = [Ask(pair.prompt, (pair.chosen, pair.rejected)) for pair in request.pairs]
    return [*pairs, *(Ask(item.prompt, (item.response,)) for item in request.items)]


def score_reply(request: ScoreRequest, answer: Answer, info: ModelInfo) -> ScoreResponse:
    """Shapes the answer to `score_asks`."""
    pairs, items = answer.results[: len(request.pairs)], answer.results[len(request.pairs) :]
    return ScoreResponse(
        model=info,
        pairs=[
            _pair(index, pair, results, request.tie_below, info.temperature)
            for index, (pair, results) in enumerate(zip(request.pairs, pairs, strict=True))
        ],
        items=[
            _item(index, item, results[0])
            for index, (item, results) in enumerate(zip(request.items, items, strict=True))
        ],
        usage=answer.usage,
    )


def best_of_n_asks(request: BestOfNRequest) -> list[Ask]:
    """Returns what `/best-of-n` asks: one group for each prompt."""
    return [Ask(prompt.prompt, prompt.candidates) for prompt in request.prompts]


def best_of_n_reply(request: BestOfNRequest, answer: Answer, info: ModelInfo) -> BestOfNResponse:
    """Shapes the answer to `best_of_n_asks`."""
    return BestOfNResponse(
        model=info,
        prompts=[prompt_reply(index, request, results, info) for index, results in enumerate(answer.results)],
        usage=answer.usage,
    )


def _response(scored: Scored) -> ResponseOut:
    return ResponseOut(reward=scored.reward, tokens=scored.tokens, truncated=scored.truncated)


def _item(index: int, item: ItemIn, result: Result) -> ItemOut | ItemError:
    if isinstance(result, MarginRMError):
        return ItemError(id=item.id, index=index, error=error_body(result))
    return ItemOut(id=item.id, index=index, reward=result.reward, tokens=result.tokens, truncated=result.truncated)


def _pair(
    index: int, pair: PairIn, results: Sequence[Result], tie_below: float, temperature: float
) -> PairOut | ItemError:
    chosen, rejected = results
    for side, result in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(result, MarginRMError):
            return ItemError(id=pair.id, index=index, error=_error_of_side(result, side))
    assert isinstance(chosen, Scored)
    assert isinstance(rejected, Scored)
    compared = ranking.compare(chosen.reward, rejected.reward, temperature, tie_below)
    return PairOut(
        id=pair.id,
        index=index,
        margin=compared.margin,
        confidence=compared.confidence,
        verdict=compared.verdict,
        chosen=_response(chosen),
        rejected=_response(rejected),
    )


def _error_of_side(error: MarginRMError, side: str) -> ErrorBody:
    """Says `chosen` or `rejected` where an error speaks of the response."""
    return error_body(error.for_response(side) if isinstance(error, EncodingError) else error.about(side))


def prompt_reply(
    index: int, request: BestOfNRequest, results: Sequence[Result], info: ModelInfo
) -> PromptOut | ItemError:
    """Ranks the candidates of one prompt that were scored; the others are listed with their errors."""
    prompt = request.prompts[index]
    places = [place for place, result in enumerate(results) if isinstance(result, Scored)]
    failed = [(place, result) for place, result in enumerate(results) if isinstance(result, MarginRMError)]
    if not places:
        return ItemError(id=prompt.id, index=index, error=error_body(failed[0][1]))
    scored = [result for result in results if isinstance(result, Scored)]
    ranked = ranking.rank([one.reward for one in scored], info.temperature, request.tie_below, request.top_k)
    return PromptOut(
        id=prompt.id,
        index=index,
        best=places[ranked.best],
        margin=ranked.margin,
        confidence=ranked.confidence,
        tie=ranked.tie,
        ranking=[
            RankedOut(
                candidate=places[entry.candidate],
                rank=entry.rank,
                reward=entry.reward,
                p_best=entry.p_best,
                text=prompt.candidates[places[entry.candidate]] if request.return_text else None,
                truncated=scored[entry.candidate].truncated,
            )
            for entry in ranked.ranking
        ],
        mean=ranked.mean,
        std=ranked.std,
        errors=[CandidateError(candidate=place, error=error_body(error)) for place, error in failed],
    )
