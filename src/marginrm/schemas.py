"""The wire shapes of `/score`, `/best-of-n`, `/v1/models` and of errors, with the examples of the OpenAPI page.

Requests are strict: an unknown field or a wrong shape refuses the whole request. Texts are the exception: they are
checked when they are encoded, so that an unusable text is an error of its own item and not of its neighbours. Replies
carry no NaN: a reward that is not finite is an item's error.
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
from marginrm.confidence.group_temperature import GroupTemperature
from marginrm.text import Truncation

_MESSAGES: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "role": {"type": "string"},
            "content": {
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]
            },
            "tool_calls": {"type": "array", "items": {"type": "object"}},
            "name": {"type": "string"},
            "tool_call_id": {"type": "string"},
        },
        "required": ["role"],
    },
}
WireText = Annotated[Any, WithJsonSchema({"type": "string"})]
WireResponse = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, _MESSAGES]}),
]
WirePrompt = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _MESSAGES]})]


def _well_formed(text: str) -> str:
    """Checks that an id can be repeated as UTF-8, which has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has a lone surrogate, which is not valid Unicode") from None
    return text


Id = Annotated[str, AfterValidator(_well_formed)]

_PROMPT = "One user message as a string, or a list of messages that ends before the response."
_RESPONSE = "A text, the steps that a process reward model reads, or messages: an answer with tool calls and results."
_STEPS = "A process reward model's reward at each step, in order; absent for other models."
_FAMILIARITY = (
    "Share of the calibration texts that are less like the others than this one, in [0, 1]; near 0 for a text unlike all "
    "of them. Absent where the checkpoint does not tell."
)
_MARGIN_STD = "Standard deviation of the margin, by the head's weights; absent where the checkpoint does not tell."
_ID = "Chosen by the client; repeated in the reply."
_INDEX = "Position in the request's list, from 0."
_MODEL = "Name of a served model, as `/v1/models` lists them."
_TRUNCATION = (
    "Treatment of a sequence over the model's limit: `error` makes it an item error; `prompt_left` cuts the prompt "
    "from its left and never the response."
)
_TIE_BELOW = "A comparison is a tie if its confidence is below this in both directions. At 0.5 only a margin of exactly 0 is one."


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Reply(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class PairIn(_Request):
    """A preference pair to score."""

    id: Id | None = Field(default=None, description=_ID)
    prompt: WirePrompt = Field(description=_PROMPT)
    chosen: WireResponse = Field(description=f"The response that is labelled as better. {_RESPONSE}")
    rejected: WireResponse = Field(description="The response that is labelled as worse.")


class ItemIn(_Request):
    """A single response to score."""

    id: Id | None = Field(default=None, description=_ID)
    prompt: WirePrompt = Field(description=_PROMPT)
    response: WireResponse = Field(description=f"The response to score. {_RESPONSE}")


class ScoreRequest(_Request):
    """Pairs to compare, single responses to score, or both."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.SCORE_REQUEST]})

    model: str = Field(default="default", description=_MODEL)
    truncation: Truncation = Field(default="error", description=_TRUNCATION)
    tie_below: float = Field(default=0.5, ge=0.5, lt=1.0, description=_TIE_BELOW)
    pairs: list[PairIn] = Field(default_factory=list, description="Optional if there are items.")
    items: list[ItemIn] = Field(default_factory=list, description="Optional if there are pairs.")

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
    prompt: WirePrompt = Field(description=_PROMPT)
    candidates: list[WireResponse] = Field(min_length=1, description=f"Responses to rank. {_RESPONSE}")


class BestOfNRequest(_Request):
    """Prompts, each with candidates to rank."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.BEST_OF_N_REQUEST]})

    model: str = Field(default="default", description=_MODEL)
    truncation: Truncation = Field(default="error", description=_TRUNCATION)
    tie_below: float = Field(default=0.5, ge=0.5, lt=1.0, description=_TIE_BELOW)
    risk_averse: float = Field(
        default=0.0,
        ge=0,
        description="k of a ranking by reward - k std, for checkpoints that tell how sure a reward is. 0: by reward.",
    )
    top_k: int | None = Field(default=None, ge=1, description="Number of candidates in each ranking; all by default.")
    return_text: bool = Field(default=False, description="Repeat the candidates' texts in the ranking.")
    prompts: list[PromptIn] = Field(min_length=1)


class ModelInfo(_Reply):
    """The model that computed a reply."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.MODEL]})

    name: str
    revision: str = Field(description="Identifies the content: the checkpoint's hash, or the commit on the Hub.")
    base_model: str
    dtype: str
    calibrated: bool = Field(description="True if a temperature was fitted. If not, T = 1 and confidences are rough.")
    temperature: float = Field(description="T of confidence = sigmoid(margin / T).")
    groups: GroupTemperature | None = Field(
        default=None, description="T for a choice among N candidates; absent where the checkpoint has none."
    )

    @model_serializer(mode="wrap")
    def _without_gaps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "groups" or value is not None}


class Usage(_Reply):
    """The cost of a reply."""

    responses: int = Field(description="Number of responses that were scored.")
    tokens: int = Field(description="Tokens of these responses, each with its whole prompt.")
    tokens_computed: int = Field(
        description="Tokens that the model computed: a shared prompt counts once, a cached reward not at all."
    )


class ErrorBody(_Reply):
    """An error. `code` is stable; `message` is for people."""

    code: str
    message: str
    param: str | None = Field(default=None, description="The field that is wrong; absent if there is none.")
    request_id: str | None = Field(default=None, description="Id of the HTTP request; absent inside items.")

    @model_serializer(mode="wrap")
    def _without_gaps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class ErrorReply(_Reply):
    """The one shape of every error reply."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.ERROR_REPLY]})

    error: ErrorBody


class ItemError(_Reply):
    """A pair, item or prompt that could not be scored. Its neighbours are not affected."""

    id: str | None = None
    index: int = Field(description=_INDEX)
    error: ErrorBody


class ResponseOut(_Reply):
    """One response's reward."""

    reward: float = Field(
        description="Unbounded; only differences between responses to one prompt, by one model, are meaningful."
    )
    tokens: int = Field(description="Length of the encoded sequence, prompt included.")
    truncated: bool = Field(description="True if the prompt was cut.")
    steps: list[float] | None = Field(default=None, description=_STEPS)
    familiarity: float | None = Field(default=None, ge=0, le=1, description=_FAMILIARITY)

    @model_serializer(mode="wrap")
    def _without_gaps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = ("steps", "familiarity")
        return {key: value for key, value in handler(self).items() if key not in optional or value is not None}


class PairOut(_Reply):
    """A scored pair."""

    id: str | None = None
    index: int = Field(description=_INDEX)
    margin: float = Field(description="reward(chosen) - reward(rejected); negative if the model disagrees.")
    confidence: float = Field(
        ge=0,
        le=1,
        description="P(chosen is better) = sigmoid(margin / T); with a `margin_std` s, T is sqrt(T^2 + pi / 8 s^2).",
    )
    margin_std: float | None = Field(default=None, ge=0, description=_MARGIN_STD)
    verdict: Literal["chosen", "rejected", "tie"]
    chosen: ResponseOut
    rejected: ResponseOut

    @model_serializer(mode="wrap")
    def _without_gaps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "margin_std" or value is not None}


class ItemOut(ResponseOut):
    """A scored single response."""

    id: str | None = None
    index: int = Field(description=_INDEX)


class ScoreResponse(_Reply):
    """Outcomes in the order of the request."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.SCORE_RESPONSE]})

    model: ModelInfo
    pairs: list[PairOut | ItemError] = Field(default_factory=list)
    items: list[ItemOut | ItemError] = Field(default_factory=list)
    usage: Usage


class RankedOut(_Reply):
    """One candidate in the ranking."""

    candidate: int = Field(description="Index of the candidate as it was given, from 0.")
    rank: int = Field(ge=1, description="1 for the best; equal rewards keep the lower index first.")
    reward: float
    p_best: float = Field(ge=0, le=1, description="Luce choice probability exp(r / T) / sum, over all candidates.")
    steps: list[float] | None = Field(default=None, description=_STEPS)
    familiarity: float | None = Field(default=None, ge=0, le=1, description=_FAMILIARITY)
    text: str | list[str] | list[dict[str, Any]] | None = Field(
        default=None, description="The candidate's text, if the request set `return_text`."
    )
    truncated: bool = Field(default=False, description="True if its prompt was cut; absent otherwise.")

    @model_serializer(mode="wrap")
    def _without_gaps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = ("steps", "text", "truncated")
        said = {key: value for key, value in handler(self).items() if key not in optional or value}
        return {key: value for key, value in said.items() if key != "familiarity" or value is not None}


class CandidateError(_Reply):
    """A candidate that could not be scored. The others are ranked without it."""

    candidate: int = Field(description="Index of the candidate as it was given, from 0.")
    error: ErrorBody


class PromptOut(_Reply):
    """The ranked candidates of one prompt."""

    id: str | None = None
    index: int = Field(description=_INDEX)
    best: int = Field(description="Index of the best candidate.")
    margin: float | None = Field(description="Best minus runner-up; null with a single candidate.")
    confidence: float | None = Field(description="P(best beats the runner-up); null with a single candidate.")
    confidence_from: Literal["pairs", "groups"] | None = Field(
        default=None,
        description="What confidence and p_best were calibrated on: given pairs, or chosen maxima. Absent without either.",
    )
    margin_std: float | None = Field(default=None, ge=0, description=_MARGIN_STD)
    tie: bool = Field(description="True if that is below `tie_below`.")
    ranking: list[RankedOut] = Field(description="Best first, at most `top_k`.")
    mean: float = Field(description="Mean reward of all candidates.")
    std: float = Field(description="Population standard deviation of their rewards.")
    errors: list[CandidateError] = Field(
        default_factory=list, description="Candidates that could not be scored; absent if there are none."
    )

    @model_serializer(mode="wrap")
    def _without_gaps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said = {key: value for key, value in handler(self).items() if key != "errors" or value}
        optional = ("confidence_from", "margin_std")
        return {key: value for key, value in said.items() if key not in optional or value is not None}


class BestOfNResponse(_Reply):
    """Outcomes in the order of the request."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.BEST_OF_N_RESPONSE]})

    model: ModelInfo
    prompts: list[PromptOut | ItemError]
    usage: Usage


class StreamEnd(_Reply):
    """Last line of a streamed reply: the fields of a plain reply other than its prompts."""

    model: ModelInfo
    usage: Usage


class StreamError(_Reply):
    """Last line of a streamed reply that cannot be completed: the status of a plain reply, and the error."""

    status: int
    error: ErrorBody


class PrefixCacheInfo(_Reply):
    """The prefix cache of a served model: keys and values of prompts and chats that later requests need not compute."""

    max_bytes: int = Field(description="Most memory that it takes.")
    bytes: int = Field(description="Memory that it takes now.")
    hits: int = Field(description="Groups of responses that began with a kept prefix, since the model was loaded.")
    tokens_saved: int = Field(description="Tokens that were not computed, since the model was loaded.")


class ModelCard(ModelInfo):
    """A served model, in the shape of OpenAI's models, with facts about its forward pass."""

    id: str = Field(description="The name, repeated for OpenAI's clients.")
    object: Literal["model"] = "model"
    created: int = Field(default=0, description="Time of loading, in seconds since 1970.")
    owned_by: str = "marginrm"
    forward_path: Literal["packed", "padded", "one_at_a_time", "upstream"] = Field(
        description="Layout of its batches; `upstream` if another server computes its rewards."
    )
    forward_reason: str = Field(description="Reason for that layout and the other optimisations in use.")
    max_length: int = Field(description="Most tokens of a sequence.")
    prefix_cache: PrefixCacheInfo | None = Field(
        default=None, description="Prefixes that are kept across requests; null where none are, see `forward_reason`."
    )


class ModelList(_Reply):
    """Reply of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
