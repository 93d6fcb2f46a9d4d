"""Text Embeddings Inference: `/predict`, and `/rerank` with `texts`. Values are sigmoids unless `raw_scores` is true.

As in TEI, a text over the limit is cut unless `truncate` is false, and an empty text is scored like any other.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field, RootModel

from marginrm.errors import InvalidTextError
from marginrm.ranking import sigmoid
from marginrm.schemas import WireText
from marginrm.text import AnyTruncation
from marginrm_service.api.adapters.common import ContractReply, ContractRequest, is_unset, reply, score
from marginrm_service.api.errors import ERROR_REPLIES
from marginrm_service.engine.request import TextGroup
from marginrm_service.state import Service, ServiceOf

router = APIRouter()


class _TeiOptions(ContractRequest):
    raw_scores: bool = Field(default=False, description="True returns rewards; the default is their sigmoid.")
    truncate: bool | None = Field(default=None, description="False refuses long texts; the default is to cut them.")
    truncation_direction: Literal["left", "right", "Left", "Right"] = Field(
        default="right",
        description="right: the longer of query and text loses its end, a decoder's query its beginning. left: the "
        "query loses its beginning.",
    )

    @property
    def truncation(self) -> AnyTruncation:
        """The treatment of sequences above the model's limit."""
        if self.truncate is False:
            return "error"
        return "prompt_left" if self.truncation_direction.lower() == "left" else "longest_first"

    def value(self, reward: float) -> float:
        """Returns a reward in the form that the request asks for."""
        return reward if self.raw_scores else sigmoid(reward)


class TeiRerankRequest(_TeiOptions):
    """A prompt and its candidates, in TEI's shape."""

    query: str
    texts: list[WireText] = Field(min_length=1)
    return_text: bool = False


class Rank(ContractReply):
    """A candidate's index and score."""

    index: int
    score: float
    text: str | None = Field(default=None, exclude_if=lambda text: text is None)
    truncated: bool = Field(default=False, exclude_if=is_unset, description="True if tokens were cut.")


class TeiRerankResponse(RootModel[list[Rank]]):
    """Best first."""


class PredictRequest(_TeiOptions):
    """A templated text; a prompt and its response; or a list with a list of either for each."""

    inputs: Any = Field(description='"text", ["prompt", "response"], or [["text"], ["prompt", "response"], ...].')


class Prediction(ContractReply):
    """The one label's value."""

    score: float
    label: str = "LABEL_0"
    truncated: bool = Field(default=False, exclude_if=is_unset, description="True if tokens were cut.")


class PredictResponse(RootModel[list[Prediction] | list[list[Prediction]]]):
    """The label of one input, or a list for each."""


async def rerank(body: TeiRerankRequest, request: Request, service: Service) -> Response:
    """Ranks texts in TEI's shape."""
    rewarded = await score(
        service,
        request,
        None,
        [TextGroup(body.query, body.texts, "document")],
        response_at=lambda i: f"texts[{i}]",
        prompt_at=lambda _: "query",
        truncation=body.truncation,
    )
    rewards = rewarded.rewards
    return await reply(
        service,
        rewarded,
        lambda: TeiRerankResponse(
            [
                Rank(
                    index=i,
                    score=body.value(rewards[i]),
                    text=body.texts[i] if body.return_text else None,
                    truncated=rewarded.scored[i].truncated,
                )
                for i in best_first(rewards)
            ]
        ),
    )


@router.post("/predict", response_model=PredictResponse, responses=ERROR_REPLIES)
async def predict(body: PredictRequest, request: Request, service: ServiceOf) -> Response:
    """Scores texts, or prompts with responses, in TEI's shape."""
    several = isinstance(body.inputs, list) and any(isinstance(one, list) for one in body.inputs)
    inputs = body.inputs if several else [body.inputs]
    rewarded = await score(
        service,
        request,
        None,
        [_group(one, index) for index, one in enumerate(inputs)],
        response_at=lambda i: f"inputs[{i}]" if several else "inputs",
        prompt_at=lambda i: f"inputs[{i}]" if several else "inputs",
        truncation=body.truncation,
    )
    values = [Prediction(score=body.value(one.reward), truncated=one.truncated) for one in rewarded.scored]
    return await reply(service, rewarded, lambda: PredictResponse([[value] for value in values] if several else values))


def best_first(rewards: list[float]) -> list[int]:
    """Returns the indices of rewards, best first; equal rewards keep their order."""
    return sorted(range(len(rewards)), key=lambda index: -rewards[index])


def _group(one: Any, index: int) -> TextGroup:
    match one:
        case str() | [str()]:
            return TextGroup(None, [one if isinstance(one, str) else one[0]], "text")
        case [str() as prompt, str() as response]:
            return TextGroup(prompt, [response], "document")
    raise InvalidTextError(
        f"inputs[{index}] must be a text, or a list of one text, or of a prompt and its response.",
        param=f"inputs[{index}]",
    )
