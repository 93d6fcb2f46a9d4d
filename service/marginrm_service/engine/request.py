"""What a request asks of a model, and what comes out of it, before either has the shape of a route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from marginrm.errors import MarginRMError
from marginrm.schemas import Usage


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt and the responses to score for it, as the client sent them: of any type.

    Attributes:
        prompt: What the responses answer.
        responses: One reward each.
        templated: The responses are whole texts, which the client's chat template has made; there is no prompt.
    """

    prompt: Any
    responses: Sequence[Any]
    templated: bool = False


@dataclass(frozen=True, slots=True)
class Scored:
    """A response's reward, its length in tokens, and whether its prompt was cut."""

    reward: float
    tokens: int
    truncated: bool


Result = Scored | MarginRMError


@dataclass(frozen=True, slots=True)
class Stages:
    """Where a request's time went, in seconds.

    Attributes:
        tokenise: Until its texts were token ids.
        queue: From then until its first part went into a step.
        forward: The steps that held a part of it.
        total: From its admission to its last reward; more than the others together if it was served in slices or waited
            for what another request computed.
    """

    tokenise: float
    queue: float
    forward: float
    total: float

    def named(self) -> dict[str, float]:
        """Returns them by name, as metrics and `Server-Timing` give them."""
        return {"tokenise": self.tokenise, "queue": self.queue, "forward": self.forward, "total": self.total}


@dataclass(frozen=True, slots=True)
class Answer:
    """What came out of a request: for each ask one result per response."""

    results: list[list[Result]]
    usage: Usage
    stages: Stages
