"""Converts requests and results from and to the wire shapes of `/score` and `/best-of-n`. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from marginrm import ranking
from marginrm.confidence.uncertain_reward import familiarity_of
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
from marginrm_service.engine.request import Result, ScoredResponse, ScoringResult, TextGroup


def score_groups(request: ScoreRequest) -> list[TextGroup]:
    """Returns the groups of a `/score` request: its pairs first, then its items."""
    pairs = [TextGroup(pair.prompt, (pair.chosen, pair.rejected)) for pair in request.pairs]
    return [*pairs, *(TextGroup(item.prompt, (item.response,)) for item in request.items)]


def score_reply(request: ScoreRequest, result: ScoringResult) -> ScoreResponse:
    """Returns the reply to a request whose `score_groups` were scored."""
    pairs, items = result.results[: len(request.pairs)], result.results[len(request.pairs) :]
    return ScoreResponse(
        model=result.model,
        pairs=[
            _pair(index, pair, results, request.tie_below, result.model.temperature)
            for index, (pair, results) in enumerate(zip(request.pairs, pairs, strict=True))
        ],
        items=[
            _item(index, item, results[0])
            for index, (item, results) in enumerate(zip(request.items, items, strict=True))
        ],
        usage=result.usage,
    )


def best_of_n_groups(request: BestOfNRequest) -> list[TextGroup]:
    """Returns the groups of a `/best-of-n` request: one for each prompt."""
    return [TextGroup(prompt.prompt, prompt.candidates) for prompt in request.prompts]


def best_of_n_reply(request: BestOfNRequest, result: ScoringResult) -> BestOfNResponse:
    """Returns the reply to a request whose `best_of_n_groups` were scored."""
    prompts = [prompt_reply(index, request, results, result.model) for index, results in enumerate(result.results)]
    return BestOfNResponse(
        model=result.model,
        prompts=prompts,
        usage=result.usage,
    )


def _response(scored: ScoredResponse) -> ResponseOut:
    return ResponseOut(
        reward=scored.reward,
        tokens=scored.tokens,
        truncated=scored.truncated,
        steps=_steps(scored),
        familiarity=familiarity_of(scored.reward),
    )


def _steps(scored: ScoredResponse) -> list[float] | None:
    return None if scored.steps is None else list(scored.steps)


def _item(index: int, item: ItemIn, result: Result) -> ItemOut | ItemError:
    if isinstance(result, MarginRMError):
        return ItemError(id=item.id, index=index, error=error_body(result))
    return ItemOut(id=item.id, index=index, **_response(result).model_dump())


def _pair(
    index: int, pair: PairIn, results: Sequence[Result], tie_below: float, temperature: float
) -> PairOut | ItemError:
    chosen, rejected = results
    for side, result in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(result, MarginRMError):
            return ItemError(id=pair.id, index=index, error=_error_of_side(result, side))
    assert isinstance(chosen, ScoredResponse)
    assert isinstance(rejected, ScoredResponse)
    compared = ranking.compare(chosen.reward, rejected.reward, temperature, tie_below)
    return PairOut(
        id=pair.id,
        index=index,
        margin=compared.margin,
        confidence=compared.confidence,
        margin_std=compared.margin_std,
        verdict=compared.verdict,
        chosen=_response(chosen),
        rejected=_response(rejected),
    )


def _error_of_side(error: MarginRMError, side: str) -> ErrorBody:
    """Returns the body of an error, in which `chosen` or `rejected` stands for the response."""
    return error_body(error.for_response(side) if isinstance(error, EncodingError) else error.about(side))


def prompt_reply(
    index: int, request: BestOfNRequest, results: Sequence[Result], info: ModelInfo
) -> PromptOut | ItemError:
    """Ranks the candidates of one prompt that were scored; the others are listed with their errors."""
    prompt = request.prompts[index]
    positions = [position for position, result in enumerate(results) if isinstance(result, ScoredResponse)]
    failed = [(position, result) for position, result in enumerate(results) if isinstance(result, MarginRMError)]
    if not positions:
        return ItemError(id=prompt.id, index=index, error=error_body(failed[0][1]))
    scored = [result for result in results if isinstance(result, ScoredResponse)]
    ranked = ranking.rank(
        [one.reward for one in scored],
        info.temperature,
        request.tie_below,
        request.top_k,
        groups=info.groups,
        risk_averse=request.risk_averse,
    )
    return PromptOut(
        id=prompt.id,
        index=index,
        best=positions[ranked.best],
        margin=ranked.margin,
        confidence=ranked.confidence,
        confidence_from=ranked.confidence_from if info.calibrated or info.groups else None,
        margin_std=ranked.margin_std,
        tie=ranked.tie,
        ranking=[
            RankedOut(
                candidate=positions[entry.candidate],
                rank=entry.rank,
                reward=entry.reward,
                p_best=entry.p_best,
                text=prompt.candidates[positions[entry.candidate]] if request.return_text else None,
                truncated=scored[entry.candidate].truncated,
                steps=_steps(scored[entry.candidate]),
                familiarity=entry.familiarity,
            )
            for entry in ranked.ranking
        ],
        mean=ranked.mean,
        std=ranked.std,
        errors=[CandidateError(candidate=position, error=error_body(error)) for position, error in failed],
    )
