"""The wire shapes of `/score`, `/best-of-n`, `/v1/models` and of errors, with the examples of the OpenAPI page.

Requests are strict: an unknown field or a wrong shape refuses the whole request. Texts alone are taken as they come,
since a text that cannot be scored is the error of its own item and must not fail the neighbours; whoever encodes them
judges them. Replies carry no NaN: a reward that is no finite number is an item's error, never a number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from marginrm import schema_examples as examples
from marginrm.text import Truncation

Text = Annotated[Any, WithJsonSchema({"type": "string"})]
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
                        "required": ["role", "content"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]


def _well_formed(text: str) -> str:
    """An id is written back as UTF-8, which has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has a lone surrogate, which is no valid Unicode") from None
    return text


Id = Annotated[str, AfterValidator(_well_formed)]

_PROMPT = "One user message as a string, or a list of messages that ends before the response."
_ID = "Yours; the answer repeats it."
_INDEX = "Position in the request's list, from 0."
_MODEL = "Name of a served model, as `/v1/models` lists them."
_TRUNCATION = (
    "What to do with a sequence over the model's limit: `error` makes it an item error, `prompt_left` cuts the "
    "prompt from its left and never the response."
)
_TIE_BELOW = "Below this confidence both ways a comparison is a tie. At 0.5 only a margin of exactly 0 is one."


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Reply(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class PairIn(_Request):
    """A preference pair to score."""

    id: Id | None = Field(default=None, description=_ID)
    prompt: Prompt = Field(description=_PROMPT)
    chosen: Text = Field(description="The response that is said to be better.")
    rejected: Text = Field(description="The response that is said to be worse.")


class ItemIn(_Request):
    """A single response to score."""

    id: Id | None = Field(default=None, description=_ID)
    prompt: Prompt = Field(description=_PROMPT)
    response: Text = Field(description="The response to score.")


class ScoreRequest(_Request):
    """Pairs to compare, single responses to score, or both."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.SCORE_REQUEST]})

    model: str = Field(default="default", description=_MODEL)
    truncation: Truncation = Field(default="error", description=_TRUNCATION)
    tie_below: float = Field(default=0.5, ge=0.5, lt=1.0, description=_TIE_BELOW)
    pairs: list[PairIn] = Field(default_factory=list, description="May be left out if there are items.")
    items: list[ItemIn] = Field(default_factory=list, description="May be left out if there are pairs.")

    @model_validator(mode="after")
    def _holds_something(self) -> ScoreRequest:
        if not self.pairs and not self.items:
            raise ValueError(
                'There is nothing to score: give at least one of "pairs" ({prompt, chosen, rejected}) '
                'or "items" ({prompt, response}).'
            )
        return self


class PromptIn(_Request):
    """A prompt and the candidates to choose from."""

    id: Id | None = Field(default=None, description=_ID)
    prompt: Prompt = Field(description=_PROMPT)
    candidates: list[Text] = Field(min_length=1, description="Responses to rank.")


class BestOfNRequest(_Request):
    """Prompts, each with its candidates to rank."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.BEST_OF_N_REQUEST]})

    model: str = Field(default="default", description=_MODEL)
    truncation: Truncation = Field(default="error", description=_TRUNCATION)
    tie_below: float = Field(default=0.5, ge=0.5, lt=1.0, description=_TIE_BELOW)
    top_k: int | None = Field(default=None, ge=1, description="Places to return per prompt; all by default.")
    return_text: bool = Field(default=False, description="Whether to repeat the candidates' texts in the ranking.")
    prompts: list[PromptIn] = Field(min_length=1)


class ModelInfo(_Reply):
    """The model that made an answer."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.MODEL]})

    name: str
    revision: str = Field(description="Names the content: the checkpoint's hash, or the commit on the Hub.")
    base_model: str
    dtype: str
    calibrated: bool = Field(description="Whether a temperature was fitted. If not, T = 1 and confidences are rough.")
    temperature: float = Field(description="T of confidence = sigmoid(margin / T).")


class Usage(_Reply):
    """What an answer cost."""

    responses: int = Field(description="Responses that were scored.")
    tokens: int = Field(description="Their tokens, each with its whole prompt.")
    tokens_computed: int = Field(
        description="Tokens that the model had to compute, as shared prompts count once and rewards that are kept not at all."
    )


class ErrorBody(_Reply):
    """What went wrong. `code` is stable; `message` is for people."""

    code: str
    message: str
    param: str | None = Field(default=None, description="The field that is wrong; left out if there is none.")
    request_id: str | None = Field(default=None, description="Of the HTTP request; left out inside items.")

    @model_serializer(mode="wrap")
    def _without_gaps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class ErrorReply(_Reply):
    """The one shape of every error reply."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.ERROR_REPLY]})

    error: ErrorBody


class ItemError(_Reply):
    """A pair, item or prompt that could not be scored; its neighbours were."""

    id: str | None = None
    index: int = Field(description=_INDEX)
    error: ErrorBody


class ResponseOut(_Reply):
    """One response's reward."""

    reward: float = Field(description="Unbounded; only differences within one prompt and one model mean something.")
    tokens: int = Field(description="Length of the encoded sequence, prompt included.")
    truncated: bool = Field(description="Whether the prompt was cut.")


class PairOut(_Reply):
    """A scored pair."""

    id: str | None = None
    index: int = Field(description=_INDEX)
    margin: float = Field(description="reward(chosen) - reward(rejected); negative if the model disagrees.")
    confidence: float = Field(ge=0, le=1, description="P(chosen is better) = sigmoid(margin / T).")
    verdict: Literal["chosen", "rejected", "tie"]
    chosen: ResponseOut
    rejected: ResponseOut


class ItemOut(ResponseOut):
    """A scored single response."""

    id: str | None = None
    index: int = Field(description=_INDEX)


class ScoreResponse(_Reply):
    """Outcomes in the order asked."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.SCORE_RESPONSE]})

    model: ModelInfo
    pairs: list[PairOut | ItemError] = Field(default_factory=list)
    items: list[ItemOut | ItemError] = Field(default_factory=list)
    usage: Usage


class RankedOut(_Reply):
    """One candidate's place."""

    candidate: int = Field(description="Index of the candidate as it was given, from 0.")
    rank: int = Field(ge=1, description="1 for the best; equal rewards keep the lower index first.")
    reward: float
    p_best: float = Field(ge=0, le=1, description="Luce choice probability exp(r / T) / sum, over all candidates.")
    text: str | None = Field(default=None, description="The candidate, if `return_text` was asked for.")
    truncated: bool = Field(default=False, description="Whether its prompt was cut; left out if not.")

    @model_serializer(mode="wrap")
    def _without_gaps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = ("text", "truncated")
        return {key: value for key, value in handler(self).items() if key not in optional or value}


class CandidateError(_Reply):
    """A candidate that could not be scored; the others were ranked without it."""

    candidate: int = Field(description="Index of the candidate as it was given, from 0.")
    error: ErrorBody


class PromptOut(_Reply):
    """The ranked candidates of one prompt."""

    id: str | None = None
    index: int = Field(description=_INDEX)
    best: int = Field(description="Index of the best candidate.")
    margin: float | None = Field(description="Best minus runner-up; null with a single candidate.")
    confidence: float | None = Field(description="P(best beats the runner-up); null with a single candidate.")
    tie: bool = Field(description="Whether that is below `tie_below`.")
    ranking: list[RankedOut] = Field(description="Best first, `top_k` at most.")
    mean: float = Field(description="Mean reward of all candidates.")
    std: float = Field(description="Population standard deviation of their rewards.")
    errors: list[CandidateError] = Field(
        default_factory=list, description="Candidates that could not be scored; left out if there are none."
    )

    @model_serializer(mode="wrap")
    def _without_gaps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "errors" or value}


class BestOfNResponse(_Reply):
    """Outcomes in the order asked."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.BEST_OF_N_RESPONSE]})

    model: ModelInfo
    prompts: list[PromptOut | ItemError]
    usage: Usage


class StreamEnd(_Reply):
    """Last line of a streamed answer: what the plain answer says beside its prompts."""

    model: ModelInfo
    usage: Usage


class StreamError(_Reply):
    """Last line of a streamed answer whose rest will not come: the status that a plain answer would have had, and why."""

    status: int
    error: ErrorBody


class ModelCard(ModelInfo):
    """A served model, in the shape that OpenAI's clients read, and how it runs."""

    id: str = Field(description="The name again.")
    object: Literal["model"] = "model"
    created: int = Field(default=0, description="When it was loaded, in seconds since 1970.")
    owned_by: str = "marginrm"
    forward_path: Literal["packed", "padded"] = Field(description="How it computes.")
    forward_reason: str = Field(description="Why that way.")
    max_length: int = Field(description="The most tokens a sequence may have.")


class ModelList(_Reply):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
