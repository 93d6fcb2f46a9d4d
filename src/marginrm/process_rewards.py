"""Process reward models: where a step's reward is read, what it is, and how the steps make a response's reward.

A process reward model judges each step of a response. The form of a checkpoint says how prompt and steps become one
text, after which token of it each step is read, and how a value becomes a step's reward; the known forms are those of
published models, each as its card uses it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from marginrm.errors import EmptyTextError
from marginrm.ranking import sigmoid

StepValue = Literal["probability", "raw"]
Aggregate = Literal["min", "product", "last", "mean"]
Layout = Literal["joined", "pieces", "turns"]

_BLANK_LINES = re.compile(r"(?<=\S)[^\S\n]*\n[^\S\n]*\n\s*(?=\S)")
VERDICT = "+"  # the assistant's turn after each step, where steps are turns


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReading:
    """How the steps of a response are read.

    Attributes:
        form: Name of a known form, or `custom`.
        separator: The text that ends each step; it is put after the last one, too.
        value: `probability`: the sigmoid of the head's value, which for a head of two classes, or two tokens, is the
            softmax probability of the better one. `raw`: the value itself.
        aggregate: How step rewards make the response's reward.
        layout: `joined`: steps and separators are one response, read at the separator. `pieces`: the same, but prompt,
            steps and separators are tokenized one by one. `turns`: each step is a user turn, answered with `+`, and is
            read at the token before that.
        frame: Jinja text of prompt and steps with `query` and `document`; None for the chat template. With `pieces`
            only the part before `document` counts.
        reward_tokens: Vocabulary entries whose logits are the head, where the checkpoint is a language model.
    """

    form: str
    separator: str
    value: StepValue
    aggregate: Aggregate
    layout: Layout = "joined"
    frame: str | None = None
    reward_tokens: tuple[str, ...] | None = None

    @property
    def marker(self) -> str:
        """The part of the separator whose last token is read: white space around it does not count."""
        return self.separator.strip() or self.separator

    def split(self, response: str | Sequence[str]) -> list[str]:
        """Cuts a response into steps.

        A list is taken as it is. A text that holds the separator is cut there; any other text is cut at the blank lines
        inside it, and one without is a single step. Steps of white space only are left out.

        Args:
            response: A checked text, or a list of checked texts.

        Raises:
            EmptyTextError: No step is left.
        """
        if not isinstance(response, str):
            return list(response)
        if self.marker not in response:
            parts = _BLANK_LINES.split(response)
        elif self.marker == self.separator:
            parts = response.split(self.separator)
        else:
            parts = re.split(rf"\s*{re.escape(self.marker)}\s*", response)
        steps = [part for part in parts if part.strip()]
        if not steps:
            raise EmptyTextError("{param} has no step: it is empty, or holds separators only.", param="response")
        return steps

    def reward(self, values: Sequence[float]) -> StepReward:
        """Makes a response's reward of the head's values at its steps.

        Args:
            values: One for each step, at least one.
        """
        steps = tuple(sigmoid(value) if self.value == "probability" else value for value in values)
        return StepReward(aggregated(steps, self.aggregate), steps)

    def describe(self) -> str:
        """Returns where and what is read, in words."""
        place = (
            f"before {VERDICT!r} after each step" if self.layout == "turns" else f"at {self.marker!r} after each step"
        )
        value = "the sigmoid of the head's value" if self.value == "probability" else "the head's value"
        if self.value == "probability" and self.reward_tokens:
            value = f"the softmax probability of {self.reward_tokens[0]!r}"
        return f"process reward model ({self.form}), read {place}, value {value}, aggregate {self.aggregate}"


class StepReward(float):
    """A response's reward with the rewards of its steps.

    Attributes:
        steps: One reward per step, in order.
    """

    __slots__ = ("steps",)
    steps: tuple[float, ...]

    def __new__(cls, reward: float, steps: Sequence[float]) -> Self:
        """Makes a reward of the aggregate and its parts."""
        made = super().__new__(cls, reward)
        made.steps = tuple(steps)
        return made

    def __getnewargs__(self) -> tuple[float, tuple[float, ...]]:  # type: ignore[override]
        """Returns what a copy is made of."""
        return float(self), self.steps


def steps_of(reward: float) -> tuple[float, ...] | None:
    """Returns the step rewards behind a reward; None for a model that gives one reward per response."""
    return reward.steps if isinstance(reward, StepReward) else None


def aggregated(steps: Sequence[float], how: Aggregate) -> float:
    """Returns one reward for the steps of a response; NaN if a step's is not finite.

    Args:
        steps: At least one reward.
        how: `min`, `product`, `last` or `mean`.
    """
    if not all(map(math.isfinite, steps)):
        return math.nan
    if how == "min":
        return min(steps)
    if how == "product":
        return math.prod(steps)
    return steps[-1] if how == "last" else math.fsum(steps) / len(steps)


FORMS = {
    reading.form: reading
    for reading in (
        # Qwen/Qwen2.5-Math-PRM-7B, 72B: model card; the aggregate: arXiv 2501.07301, section 4.
        StepReading(form="qwen2.5-math-prm", separator="<extra_0>", value="probability", aggregate="product"),
        # peiyi9979/math-shepherd-mistral-7b-prm: model card; the aggregate: arXiv 2312.08935, section 3.4.
        StepReading(
            form="math-shepherd",
            separator=" ки\n",
            value="probability",
            aggregate="min",
            frame="{{ query }} {{ document }}",
            reward_tokens=("+", "-"),
        ),
        # RLHFlow/Llama3.1-8B-PRM-Deepseek-Data, -Mistral-Data: RLHF-Reward-Modeling, math-rm/prm_evaluate.py.
        StepReading(
            form="rlhflow-prm",
            separator="\n\n",
            value="probability",
            aggregate="mean",
            layout="turns",
            reward_tokens=(VERDICT, "-"),
        ),
        # Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B, 7B: skywork-o1-prm-inference, model_utils/io_utils.py.
        StepReading(
            form="skywork-o1-prm",
            separator="\n",
            value="probability",
            aggregate="mean",
            layout="pieces",
            frame="{{ query }}\n{{ document }}",
        ),
        # TRL's PRMTrainer: docs/source/prm_trainer.md; it names no aggregate.
        StepReading(
            form="trl-prm",
            separator="\n",
            value="probability",
            aggregate="min",
            frame="{{ query }}\n{{ document }}",
        ),
    )
}
