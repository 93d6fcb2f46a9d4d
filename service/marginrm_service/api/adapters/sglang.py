"""SGLang's native route for reward models: `/classify` with `text` or `input_ids`, as the models' cards send it.

The route is registered by `adapters.vllm`, whose `/classify` has the same path and other fields.
"""

from __future__ import annotations

from typing import Any, Self

from fastapi import Request, Response
from pydantic import Field, RootModel, model_validator

from marginrm.schemas import WireText
from marginrm_service.api.adapters.common import (
    ContractReply,
    ContractRequest,
    Rewarded,
    either,
    new_id,
    reply,
    score,
    templated,
    texts_of,
)
from marginrm_service.engine.request import TextGroup
from marginrm_service.state import Service


class ClassifyRequest(ContractRequest):
    """Templated texts, or their token ids."""

    model_config = either("text", "input_ids")

    model: str | None = None
    text: WireText | list[WireText] | None = Field(
        default=None, description="A text, several, or pairs of a prompt and a response."
    )
    input_ids: list[Any] | None = Field(default=None, description="Token ids of one text, or of several.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError('give either "text" or "input_ids".')
        return self

    @property
    def field(self) -> str:
        """Name of the field that holds the texts."""
        return "text" if self.input_ids is None else "input_ids"

    @property
    def texts(self) -> list[Any]:
        """The texts, pairs or token ids."""
        return texts_of(self.text if self.input_ids is None else self.input_ids)

    @property
    def single(self) -> bool:
        """Whether the request holds one text, whose reply is not a list."""
        return isinstance(self.text, str) or (self.input_ids is not None and self.texts == [self.input_ids])


class Meta(ContractReply):
    """What SGLang says of a request."""

    id: str = Field(default_factory=lambda: new_id("classify"))
    prompt_tokens: int


class Embedding(ContractReply):
    """One text's raw reward, as a vector of one."""

    embedding: list[float]
    meta_info: Meta


class ClassifyResponse(RootModel[Embedding | list[Embedding]]):
    """One object for one text, a list for a list."""


async def classify(body: ClassifyRequest, request: Request, service: Service) -> Response:
    """Scores texts in SGLang's shape; the raw reward is `embedding[0]`."""
    rewarded = await score(
        service,
        request,
        body.model,
        _groups(body.texts),
        response_at=lambda i: body.field if body.single else f"{body.field}[{i}]",
        prompt_at=lambda i: f"{body.field}[{i}]",
    )
    return await reply(service, rewarded, lambda: _reply(body, rewarded))


def _groups(texts: list[Any]) -> list[TextGroup]:
    if any(_is_pair(one) for one in texts):
        return [TextGroup(one[0], [one[1]]) if _is_pair(one) else TextGroup(None, [one], "text") for one in texts]
    return templated(texts)


def _is_pair(one: Any) -> bool:
    return isinstance(one, list) and len(one) == 2 and all(isinstance(part, str) for part in one)


def _reply(body: ClassifyRequest, rewarded: Rewarded) -> ClassifyResponse:
    found = [Embedding(embedding=[one.reward], meta_info=Meta(prompt_tokens=one.tokens)) for one in rewarded.scored]
    return ClassifyResponse(found[0] if body.single else found)
