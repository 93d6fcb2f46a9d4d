"""Scoring requests and results in the service's own form, independent of any route's JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from marginrm.errors import MarginRMError
from marginrm.schemas import ModelInfo, Usage
from marginrm.text import AnyTruncation

# conversation: a prompt and its responses.
# document: the same; a response may be empty, and is cut to the limit where the truncation asks for it.
# generation: the same, as an inference engine has them: rendered, with generation prompt and end marker, or not.
# text: the responses are whole texts, or their token ids, that the client's chat template has made; no prompt.
# ended_text: the same; a text that stops short gets the end that the model's own conversations have.
Form = Literal["conversation", "document", "generation", "text", "ended_text"]


@dataclass(frozen=True, slots=True)
class TextGroup:
    """A prompt and the responses to score for it, as the client sent them. They may be of any type.

    Attributes:
        prompt: Text or messages that the responses answer.
        responses: Each gets one reward.
        form: The form of the texts.
        most_tokens: The end of a document with more tokens than this is cut.
    """

    prompt: Any
    responses: Sequence[Any]
    form: Form = "conversation"
    most_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """The work of one HTTP request.

    Attributes:
        groups: Prompts with their responses. The prompt of a group is computed once.
        truncation: The treatment of sequences above the model's limit.
        bulk: The request uses the capacity that interactive requests leave.
        seconds: Time until its deadline.
        tenant: Kept prefixes are shared among requests with this name only.
    """

    groups: Sequence[TextGroup]
    truncation: AnyTruncation = "error"
    bulk: bool = False
    seconds: float = math.inf
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """A reward, the tokens of its sequence, and whether it was cut to fit.

    `reward` is an `UncertainReward` where the checkpoint says how sure its rewards are. `steps` holds the rewards of its
    steps; None unless the model is a process reward model.
    """

    reward: float
    tokens: int
    truncated: bool
    steps: tuple[float, ...] | None = None


Result = ScoredResponse | MarginRMError


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that a request spent in each stage.

    Attributes:
        tokenise: Until its texts were token ids.
        queue: From then until its first slice went into a step.
        forward: All steps that held a part of it.
        total: From its admission to its last reward. It exceeds the sum of the others if the request was computed in
            several slices or waited for responses that another request computed.
    """

    tokenise: float
    queue: float
    forward: float
    total: float

    def by_stage(self) -> dict[str, float]:
        """Returns the seconds by the stage's name, as in metrics and in `Server-Timing`."""
        return {"tokenise": self.tokenise, "queue": self.queue, "forward": self.forward, "total": self.total}


@dataclass(frozen=True, slots=True)
class Reuse:
    """Number of responses by the source of their rewards.

    Attributes:
        stored: The reward cache.
        in_flight: Another request, or an equal response of the same request.
        computed: The model.
    """

    stored: int = 0
    in_flight: int = 0
    computed: int = 0


@dataclass(frozen=True, slots=True)
class GroupResult:
    """The results of one group, which may be known before those of the others.

    Attributes:
        index: Position of the group in the request.
        results: One per response.
        model: The model that scored it.
    """

    index: int
    results: list[Result]
    model: ModelInfo


OnGroup = Callable[[GroupResult], None]


@dataclass(frozen=True, slots=True)
class ScoringResult:
    """The outcome of a request.

    Attributes:
        model: The model that scored it.
        results: For each group one result per response.
        usage: Numbers of responses and tokens.
        timings: Seconds by stage.
        reuse: Sources of the rewards; None if the reward cache is off.
    """

    model: ModelInfo
    results: list[list[Result]]
    usage: Usage
    timings: Timings
    reuse: Reuse | None = None
