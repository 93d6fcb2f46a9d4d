"""The reading of a checkpoint: what its user may say about it, and what was found and decided at load.

Neither needs torch, so commands and settings can take them before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from marginrm.errors import ConfigError
from marginrm.process_rewards import Aggregate, StepReading, StepValue
from marginrm.text import check_choice

Bos = Literal["auto", "on", "off", "double"]
Eos = Literal["auto", "on", "off"]
Activation = Literal["relu", "gelu", "silu", "tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingOptions:
    """Facts that a user may state about a checkpoint that does not state them itself.

    Attributes:
        bos: The beginning-of-sequence token. `auto`: as `apply_chat_template(tokenize=True)` gives it, or as the
            tokenizer adds it to plain text. `on`: exactly one. `off`: none. `double`: two, as cards get them that
            tokenize the rendered text.
        eos: The end-of-sequence token. `auto`: as the chat template prints it; one at the end of plain text. `on`: the
            text without the line breaks at its end, then exactly one, as OpenRLHF trains. `off`: none is added.
        label_weights: A weight for each row of a head with several: reward = sum of weight x logit.
        reward_tokens: Vocabulary entries of a causal language model whose logits are the reward: one, or two of which
            the second is subtracted. A token's text, or `id:N` for the entry N.
        frame: The text around query and document of a reranker: the name of a known frame, or a Jinja template file
            with `query`, `document`, `instruction` and `messages`.
        head_activation: The activation between the two layers of a head, where the checkpoint does not say it.
        steps: What ends the steps that a process reward model reads: the name of a known form
            (`process_rewards.FORMS`), or the separator itself, in which a backslash and an n are a line
            break.
        step_value: What a step's reward is, as in `StepReading`; by default as the form or the head says.
        aggregate: How step rewards make the response's reward; by default as the form says, `min` otherwise.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        ConfigError: A value is not a valid one.
    """

    bos: Bos = "auto"
    eos: Eos = "auto"
    label_weights: tuple[float, ...] | None = None
    reward_tokens: tuple[str, ...] | None = None
    frame: str | None = None
    head_activation: Activation | None = None
    steps: str | None = None
    step_value: StepValue | None = None
    aggregate: Aggregate | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_choice(self.bos, "bos", Bos)
        check_choice(self.eos, "eos", Eos)
        if self.head_activation is not None:
            check_choice(self.head_activation, "head_activation", Activation)
        if self.step_value is not None:
            check_choice(self.step_value, "step_value", StepValue)
        if self.aggregate is not None:
            check_choice(self.aggregate, "aggregate", Aggregate)
        if self.steps == "":
            raise ConfigError("steps is empty. Give the text that ends each step, or the name of a known form.")
        if self.label_weights is not None and not all(map(math.isfinite, self.label_weights)):
            raise ConfigError(f"label_weights = {list(self.label_weights)}: each must be a finite number.")
        if self.reward_tokens is not None and len(self.reward_tokens) not in (1, 2):
            raise ConfigError(
                f"reward_tokens = {list(self.reward_tokens)}: give one token, or two of which the second's logit is "
                "subtracted, such as yes,no."
            )

    @classmethod
    def parse(
        cls, *, label_weights: str | None = None, reward_tokens: str | None = None, **others: Any
    ) -> ReadingOptions:
        """Makes options from a command line's text.

        Args:
            label_weights: Numbers with commas between them, such as `-1,1`.
            reward_tokens: Tokens with a comma between them, such as `yes,no` or `id:0`.
            **others: The other attributes as they are.

        Raises:
            ConfigError: A value is not a valid one.
        """
        try:
            weights = None if label_weights is None else tuple(float(part) for part in label_weights.split(","))
        except ValueError as error:
            raise ConfigError(
                f"label_weights = {label_weights!r}: give a number for each row of the head, such as -1,1."
            ) from error
        tokens = None if reward_tokens is None else tuple(reward_tokens.split(","))
        return cls(label_weights=weights, reward_tokens=tokens, **others)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReading:
    """The record of what a checkpoint is and how its rewards are read, made at load.

    Attributes:
        checkpoint: The folder or Hub name, as given.
        usage: How its author's library reads it, in a word: `classifier`, `value-head`, `token-logits` or `own-code`.
        architecture: `decoder` (causal) or `encoder`.
        backbone: Class and size of the model below the head.
        head: Where the head was found, its layers and rows.
        reward: The position that is read, and what is computed there.
        template: What puts prompt and response into one text.
        bos: As in `ReadingOptions`, or `single` for a checkpoint with a manifest that has one BOS.
        leading_bos: How many BOS tokens its sequences start with.
        eos: As in `ReadingOptions`.
        adds_eos: Whether an EOS is put after a text that does not end in one.
        max_length: The most tokens that a sequence may have.
        dtype: The backbone's dtype; the head is float32.
        quantisation: The method of quantised weights, or None.
        steps: How the steps of a response are read; None unless it is a process reward model.
        options: The `ReadingOptions` that it was read with, by name; defaults are left out.
        notes: Decisions that a user should know of, one sentence each.
    """

    checkpoint: str
    usage: Literal["classifier", "value-head", "token-logits", "own-code"]
    architecture: Literal["decoder", "encoder"]
    backbone: str
    head: str
    reward: str
    template: str
    bos: str
    leading_bos: int
    eos: str
    adds_eos: bool
    max_length: int
    dtype: str
    quantisation: str | None = None
    steps: StepReading | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Returns the record as plain JSON values."""
        return dataclasses.asdict(self) | {"notes": list(self.notes)}
