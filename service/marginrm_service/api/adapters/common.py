"""Shared by the adapters: request and reply base models, grouping of texts, and scoring with request-level errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from marginrm.errors import EncodingError, MarginRMError
from marginrm.text import AnyTruncation
from marginrm.texts.messages import normalised, plain_text
from marginrm_service.api import scoring_request
from marginrm_service.engine.request import Form, Result, ScoredResponse, ScoringResult, TextGroup
from marginrm_service.settings import DEFAULT_MODEL
from marginrm_service.state import Service


class ContractRequest(BaseModel):
    """A request in the shape of another server.

    Fields that cannot change a reward are ignored. Fields that would, and that this server does not support, are
    refused: each contract names them.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


# Templated text or texts, or their token ids. Each value is checked where it is encoded, to name the one that is wrong.
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
WireTexts = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                _IDS,
                {"type": "array", "items": _IDS},
            ]
        }
    ),
]


def either(*fields: str) -> ConfigDict:
    """Returns the configuration of a request that has one of two fields, so that its JSON schema says so."""
    return ConfigDict(json_schema_extra={"oneOf": [{"required": [field]} for field in fields]})


class ContractReply(BaseModel):
    """A reply in the shape of another server."""

    model_config = ConfigDict(allow_inf_nan=False)


class TokenUsage(ContractReply):
    """OpenAI's count of tokens: all sequences, each with its whole prompt."""

    prompt_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Rewarded:
    """The outcome of a request of which every response was scored.

    Attributes:
        result: The outcome as the engine gives it.
        scored: One per response, in the order of the request.
    """

    result: ScoringResult
    scored: list[ScoredResponse]

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.result.model.name

    @property
    def rewards(self) -> list[float]:
        """The raw rewards."""
        return [one.reward for one in self.scored]

    @property
    def usage(self) -> TokenUsage:
        """Its tokens, in OpenAI's form."""
        tokens = self.result.usage.tokens
        return TokenUsage(prompt_tokens=tokens, total_tokens=tokens)


def is_unset(value: Any) -> bool:
    """Tells pydantic to leave out a field that is false or None."""
    return not value


class Listed(ContractReply):
    """The common fields of OpenAI's and vLLM's lists."""

    id: str = Field(default_factory=lambda: new_id("list"))
    object: str = "list"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    usage: TokenUsage


async def score(
    service: Service,
    request: Request,
    model: str | None,
    groups: Sequence[TextGroup],
    *,
    response_at: Callable[[int], str],
    prompt_at: Callable[[int], str] = lambda _: "prompt",
    truncation: AnyTruncation = "error",
) -> Rewarded:
    """Scores the groups of a contract's request.

    Most contracts have no place for the error of one response, so the first such error is the request's.

    Args:
        service: The state of the app.
        request: The HTTP request.
        model: The name that the client sent, if the contract has one.
        groups: Prompts with their responses, or templated texts.
        response_at: Returns the field of a response, by its position among all, for its error.
        prompt_at: Returns the field of its prompt.
        truncation: The treatment of sequences above the model's limit.

    Raises:
        MarginRMError: As `scoring_request.run` does; or a response could not be scored.
    """
    result, found = await score_each(
        service, request, model, groups, response_at=response_at, prompt_at=prompt_at, truncation=truncation
    )
    return Rewarded(result, [scored_or_raise(one) for one in found])


async def score_each(
    service: Service,
    request: Request,
    model: str | None,
    groups: Sequence[TextGroup],
    *,
    response_at: Callable[[int], str],
    prompt_at: Callable[[int], str] = lambda _: "prompt",
    truncation: AnyTruncation = "error",
) -> tuple[ScoringResult, list[Result]]:
    """Scores as `score`, and returns an error in place of each response that could not be scored.

    Raises:
        MarginRMError: As `scoring_request.run` does.
    """
    name = service.registry.known_or_only(model or DEFAULT_MODEL)
    result = await scoring_request.run(service, request, name, groups, truncation)
    found: list[Result] = []
    for index, one in enumerate(one for group in result.results for one in group):
        if isinstance(one, EncodingError):
            field = prompt_at(index) if (one.param or "").startswith("prompt") else response_at(index)
            found.append(one.about(field))
        else:
            found.append(one)
    return result, found


def scored_or_raise(one: Result) -> ScoredResponse:
    """Returns a scored response.

    Raises:
        MarginRMError: It could not be scored.
    """
    if isinstance(one, MarginRMError):
        raise one
    return one


async def reply(service: Service, rewarded: Rewarded, make: Callable[[], BaseModel]) -> Response:
    """Sends a reply; a large one is made off the event loop."""
    _, response = await scoring_request.respond(service, rewarded.result, make)
    return response


def templated(texts: Sequence[Any], form: Form = "text") -> list[TextGroup]:
    """Returns groups of templated texts, in order; each text gets one reward.

    Neighbours that begin alike are most likely samples for one prompt, so they form one group and share its
    computation. That changes no reward, because members of a group never attend to each other.

    Args:
        texts: The texts, or token ids.
        form: Their form, `text` or `ended_text`.
    """
    groups: list[list[Any]] = []
    for text in texts:
        if groups and _begin_alike(groups[-1][0], text):
            groups[-1].append(text)
        else:
            groups.append([text])
    return [TextGroup(None, group, form) for group in groups]


def paired(prompts: Sequence[Any], responses: Sequence[Any]) -> list[TextGroup]:
    """Returns groups of prompts with their responses, in order; neighbours with equal prompts form one group."""
    groups: list[tuple[Any, list[Any]]] = []
    for prompt, response in zip(prompts, responses, strict=True):
        if groups and groups[-1][0] == prompt:
            groups[-1][1].append(response)
        else:
            groups.append((prompt, [response]))
    return [TextGroup(prompt, group) for prompt, group in groups]


def conversation(messages: Sequence[Any]) -> TextGroup:
    """Returns a group of one response, the last turn of a conversation.

    Raises:
        EncodingError: It does not end with the assistant's turn.
    """
    last = messages[-1]
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise EncodingError(
            "The last message must be the assistant's, because it is the response that is scored.",
            param=f"messages[{len(messages) - 1}]",
        )
    answer = normalised(last, f"messages[{len(messages) - 1}]", other_fields=True)
    return TextGroup(list(messages[:-1]), [plain_text(answer)])


def as_list(value: Any) -> list[Any]:
    """Returns a list as it is, and any other value as a list of one."""
    return value if isinstance(value, list) else [value]


def texts_of(value: Any) -> list[Any]:
    """Returns the texts of an input: one, several, or the token ids of either."""
    return [value] if isinstance(value, list) and value and isinstance(value[0], int) else as_list(value)


def new_id(kind: str) -> str:
    """Returns an id such as `rerank-5f3e...`."""
    return f"{kind}-{uuid.uuid4().hex}"


def _begin_alike(first: Any, second: Any) -> bool:
    """Returns whether two texts have their first half in common."""
    if type(first) is not type(second) or not isinstance(first, str | list):
        return False
    half = max(len(first), len(second)) // 2
    return half > 0 and first[:half] == second[:half]
