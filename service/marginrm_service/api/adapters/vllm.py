"""vLLM's pooling API: `/classify`, which verl's reward loop uses, `/pooling` and `/score`.

By default the value of a single label is a sigmoid; `use_activation: false` returns the raw reward.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request, Response
from pydantic import AliasChoices, Discriminator, Field, Tag, model_validator

from marginrm.errors import InvalidTextError
from marginrm.ranking import sigmoid
from marginrm.schemas import WirePrompt, WireText
from marginrm.text import Truncation
from marginrm_service.api.adapters import sglang
from marginrm_service.api.adapters.common import (
    ContractReply,
    ContractRequest,
    Listed,
    Rewarded,
    WireTexts,
    as_list,
    conversation,
    either,
    new_id,
    paired,
    reply,
    score,
    templated,
    texts_of,
)
from marginrm_service.api.errors import ERROR_REPLIES
from marginrm_service.engine.request import ScoredResponse
from marginrm_service.models.served_model import ServedModel
from marginrm_service.settings import DEFAULT_MODEL
from marginrm_service.state import Service, ServiceOf

router = APIRouter()
_LABEL = "LABEL_0"  # the name that transformers gives to a single label


class _PoolingOptions(ContractRequest):
    model: str | None = None
    # Older versions of vLLM, and of verl, have other names for it.
    use_activation: bool | None = Field(
        default=None,
        validation_alias=AliasChoices("use_activation", "activation", "softmax"),
        description="False returns raw rewards; the default is their sigmoid.",
    )
    truncate_prompt_tokens: int | None = Field(
        default=None, description="-1 cuts the prompt to the model's limit; other lengths are refused."
    )
    chat_template: None = Field(
        default=None, description="The checkpoint's own template is used; any other is refused."
    )

    @model_validator(mode="after")
    def _cuts_to_the_limit_only(self) -> Self:
        if self.truncate_prompt_tokens not in {None, -1}:
            raise ValueError("truncate_prompt_tokens must be -1, the model's limit, or left out.")
        return self

    @property
    def truncation(self) -> Truncation:
        """The treatment of sequences above the model's limit."""
        return "error" if self.truncate_prompt_tokens is None else "prompt_left"

    def value(self, reward: float) -> float:
        """Returns a reward in the form that the request asks for."""
        return reward if self.use_activation is False else sigmoid(reward)


class PoolingRequest(_PoolingOptions):
    """Templated texts, or one conversation that ends with the response."""

    model_config = either("input", "messages")

    input: WireTexts = Field(default=None, description="A text, texts, or the token ids of one or of several.")
    messages: list[Any] | None = Field(default=None, min_length=1)
    task: Literal["classify", "token_classify"] | None = Field(
        default=None,
        description="On /pooling: token_classify for a process reward model's steps, its default; classify for one value.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError('give either "input" (templated text or texts) or "messages" (one conversation).')
        return self


class ClassData(ContractReply):
    """One label's value: the raw reward, or its sigmoid."""

    index: int
    label: str = _LABEL
    probs: list[float]
    num_classes: int = 1


class ClassifyResponse(Listed):
    """Reply of `/classify`."""

    id: str = Field(default_factory=lambda: new_id("classify"))
    data: list[ClassData]


class PoolingData(ContractReply):
    """One text's value; for the steps of a process reward model, a list for each, the probabilities of a bad and of a good step."""

    index: int
    object: str = "pooling"
    data: list[float] | list[list[float]]


class PoolingResponse(Listed):
    """Reply of `/pooling`."""

    id: str = Field(default_factory=lambda: new_id("pool"))
    data: list[PoolingData]


class PairScoreRequest(_PoolingOptions):
    """Prompts and responses: as many of one as of the other, or one prompt for all.

    vLLM has four names for the two: text_1/text_2, queries/documents, queries/items, data_1/data_2.
    """

    text_1: WirePrompt | list[WirePrompt] = Field(description="Prompt or prompts.")
    text_2: WireText | list[WireText] = Field(description="Response or responses.")
    max_tokens_per_query: int = Field(default=0, ge=0, le=0, description="Queries are never cut to a length: 0 only.")
    max_tokens_per_doc: int = Field(default=0, ge=0, le=0, description="Responses are never cut: 0 only.")

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for prompts, responses in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
            if prompts in body and responses in body:
                return {**body, "text_1": body[prompts], "text_2": body[responses]}
        return body

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        prompts, responses = len(as_list(self.text_1)), len(as_list(self.text_2))
        if prompts not in {1, responses} or not responses:
            raise ValueError(
                f"{prompts} prompts do not match {responses} responses. Send one prompt for each response, or one for all."
            )
        return self


class ScoreData(ContractReply):
    """One pair's value."""

    index: int
    object: str = "score"
    score: float


class PairScoreResponse(Listed):
    """Reply of `/score` in vLLM's shape."""

    id: str = Field(default_factory=lambda: new_id("score"))
    data: list[ScoreData]


def _contract(body: Any) -> str:
    return "sglang" if isinstance(body, dict) and ("text" in body or "input_ids" in body) else "vllm"


EitherRequest = Annotated[
    Annotated[PoolingRequest, Tag("vllm")] | Annotated[sglang.ClassifyRequest, Tag("sglang")], Discriminator(_contract)
]


@router.post("/classify", response_model=ClassifyResponse | sglang.ClassifyResponse, responses=ERROR_REPLIES)
async def classify(body: EitherRequest, request: Request, service: ServiceOf) -> Response:
    """Scores vLLM's `input` or `messages`, or SGLang's `text` or `input_ids`, each in its server's shape.

    In vLLM's, as verl reads it, the raw reward is `probs[-1]` with `use_activation: false`.
    """
    if isinstance(body, sglang.ClassifyRequest):
        return await sglang.classify(body, request, service)
    if body.task == "token_classify":
        raise InvalidTextError("{param} = token_classify is a task of /pooling.", param="task")
    rewarded = await _pool(body, request, service)
    return await reply(
        service,
        rewarded,
        lambda: ClassifyResponse(
            model=rewarded.model,
            usage=rewarded.usage,
            data=[ClassData(index=i, probs=[body.value(reward)]) for i, reward in enumerate(rewarded.rewards)],
        ),
    )


@router.post("/pooling", response_model=PoolingResponse, responses=ERROR_REPLIES)
async def pooling(body: PoolingRequest, request: Request, service: ServiceOf) -> Response:
    """Scores texts in the shape of vLLM's pooling route; of a process reward model the steps of each, as vLLM does."""
    with await service.registry.acquire(service.registry.known_or_only(body.model or DEFAULT_MODEL)) as model:
        by_step = body.task != "classify" and _gives_steps(body, model)
    rewarded = await _pool(body, request, service)
    return await reply(
        service,
        rewarded,
        lambda: PoolingResponse(
            model=rewarded.model,
            usage=rewarded.usage,
            data=[
                PoolingData(index=i, data=_pooled(body, one, by_step=by_step)) for i, one in enumerate(rewarded.scored)
            ],
        ),
    )


@router.post("/v1/score", response_model=PairScoreResponse, responses=ERROR_REPLIES)
async def score_pairs(body: PairScoreRequest, request: Request, service: ServiceOf) -> Response:
    """Scores responses to prompts in vLLM's shape. (`/score` itself is this server's own route.)"""
    prompts, responses = as_list(body.text_1), as_list(body.text_2)
    if len(prompts) == 1:
        prompts *= len(responses)
    rewarded = await score(
        service,
        request,
        body.model,
        paired(prompts, responses),
        response_at=lambda i: f"text_2[{i}]",
        prompt_at=lambda i: f"text_1[{i}]",
        truncation=body.truncation,
    )
    return await reply(
        service,
        rewarded,
        lambda: PairScoreResponse(
            model=rewarded.model,
            usage=rewarded.usage,
            data=[ScoreData(index=i, score=body.value(reward)) for i, reward in enumerate(rewarded.rewards)],
        ),
    )


def _pooled(body: PoolingRequest, one: ScoredResponse, *, by_step: bool) -> list[float] | list[list[float]]:
    """Returns one text's data: its value, or for each of its steps the probabilities of a bad and of a good one.

    vLLM answers so for Qwen2.5-Math-PRM, whose head has two classes.
    """
    if by_step and one.steps is not None:
        return [[1 - step, step] for step in one.steps]
    return [body.value(one.reward)]


def _gives_steps(body: PoolingRequest, model: ServedModel) -> bool:
    """Returns whether the model that is asked gives probabilities of steps.

    Raises:
        InvalidTextError: It does not, and the request asks for them.
    """
    steps = model.encoder.policy.steps
    found = steps is not None and steps.value == "probability" and body.use_activation is not False
    if body.task == "token_classify" and not found:
        raise InvalidTextError(
            "{param} = token_classify: this needs a process reward model whose steps are probabilities, and no "
            "use_activation. Leave the task out.",
            param="task",
        )
    return found


async def _pool(body: PoolingRequest, request: Request, service: Service) -> Rewarded:
    groups = templated(texts_of(body.input)) if body.messages is None else [conversation(body.messages)]
    return await score(
        service,
        request,
        body.model,
        groups,
        response_at=lambda i: f"input[{i}]" if body.messages is None else f"messages[{len(body.messages) - 1}]",
        prompt_at=lambda _: "messages",
        truncation=body.truncation,
    )
