"""What the adapters share: from texts to asks, from an answer to rewards, and their requests' manners."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field

from marginrm.errors import EncodingError, MarginRMError
from marginrm.text import Truncation
from marginrm_service.api.native import ask, json_reply, shape
from marginrm_service.engine.request import Answer, Ask, Scored
from marginrm_service.models.served_model import ServedModel
from marginrm_service.state import Service, ServiceOf


class ContractRequest(BaseModel):
    """A request in somebody else's words.

    Fields that cannot change a reward are ignored. Those that would, and that this server does not honour, are
    refused: each contract names them.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class ContractReply(BaseModel):
    """An answer in somebody else's words."""

    model_config = ConfigDict(allow_inf_nan=False)


class TokenUsage(ContractReply):
    """OpenAI's count of tokens: those of all sequences, each with its whole prompt."""

    prompt_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Rewarded:
    """A request's rewards, one per response in the order asked."""

    model: ServedModel
    answer: Answer
    scored: list[Scored]

    @property
    def rewards(self) -> list[float]:
        """The raw rewards."""
        return [one.reward for one in self.scored]

    @property
    def usage(self) -> TokenUsage:
        """What it cost."""
        return TokenUsage(prompt_tokens=self.answer.usage.tokens, total_tokens=self.answer.usage.tokens)


class Listed(ContractReply):
    """What OpenAI's and vLLM's lists begin with."""

    id: str = Field(default_factory=lambda: new_id("list"))
    object: str = "list"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    usage: TokenUsage


def overload_status(request: Request, service: ServiceOf) -> None:
    """Makes a full queue answer what adapters' clients try again on: verl does so for 5xx only."""
    request.state.overload_status = service.settings.adapter_overload_status


async def score(
    service: Service,
    request: Request,
    model: str | None,
    asks: Sequence[Ask],
    *,
    response_at: Callable[[int], str],
    prompt_at: Callable[[int], str] = lambda _: "prompt",
    truncation: Truncation = "error",
) -> Rewarded:
    """Scores what a contract asks. These contracts have no place for an item's error: the first one is the request's.

    Args:
        service: Of the app.
        request: Whose client may hang up.
        model: The name that the client sent, if the contract has one.
        asks: Prompts and responses, or templated texts.
        response_at: Names a response's field, by its position among all, for its error.
        prompt_at: Names its prompt's.
        truncation: What to do with what is too long.

    Raises:
        MarginRMError: As `routes.ask` does; or a response could not be scored.
    """
    served = service.registry.get_or_only(model or "default")
    answer = await ask(service, served, request, asks, truncation)
    scored: list[Scored] = []
    for index, result in enumerate(result for row in answer.results for result in row):
        if isinstance(result, EncodingError):
            field = prompt_at(index) if (result.param or "").startswith("prompt") else response_at(index)
            raise result.about(field)
        if isinstance(result, MarginRMError):
            raise result
        scored.append(result)
    return Rewarded(served, answer, scored)


async def reply(service: Service, rewarded: Rewarded, make: Callable[[], BaseModel]) -> Response:
    """Sends an answer; a large one is made off the event loop."""
    _, content = await shape(service, rewarded.answer.usage.responses, make)
    return json_reply(content, rewarded.answer.stages)


def templated(texts: Sequence[Any]) -> list[Ask]:
    """Returns what asks for one reward per templated text, in order.

    Neighbours that begin alike are most likely samples for one prompt: as one group they share its computation. It
    changes no reward, since members of a group never see each other.
    """
    groups: list[list[Any]] = []
    for text in texts:
        if groups and _begin_alike(groups[-1][0], text):
            groups[-1].append(text)
        else:
            groups.append([text])
    return [Ask(None, group, templated=True) for group in groups]


def paired(prompts: Sequence[Any], responses: Sequence[Any]) -> list[Ask]:
    """Returns what asks for one reward per prompt and response, in order; neighbours with one prompt are one group."""
    groups: list[tuple[Any, list[Any]]] = []
    for prompt, response in zip(prompts, responses, strict=True):
        if groups and groups[-1][0] == prompt:
            groups[-1][1].append(response)
        else:
            groups.append((prompt, [response]))
    return [Ask(prompt, group) for prompt, group in groups]


def conversation(messages: Sequence[Any]) -> Ask:
    """Returns what asks for the reward of a conversation's last turn.

    Raises:
        EncodingError: It does not end with the assistant's turn.
    """
    last = messages[-1]
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise EncodingError(
            "The last message must be the assistant's: it is the response that is scored.",
            param=f"messages[{len(messages) - 1}]",
        )
    return Ask(list(messages[:-1]), [last.get("content")])


def new_id(kind: str) -> str:
    """Returns an id such as `rerank-5f3e...`."""
    return f"{kind}-{uuid.uuid4().hex}"


def _begin_alike(first: Any, second: Any) -> bool:
    """Whether two texts have their first half in common."""
    if not isinstance(first, str) or not isinstance(second, str):
        return False
    half = max(len(first), len(second)) // 2
    return half > 0 and first[:half] == second[:half]
