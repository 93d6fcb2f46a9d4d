"""Every error that the library raises on purpose, as one tree.

```
MarginRMError
├── DataError             a file row is unusable; names path:line and field
├── ConfigError           a training or service setting is unusable; names the key
├── CalibrationError      no temperature can be fitted to these margins and targets
├── EncodingError         one (prompt, response) cannot become token ids
│   ├── InvalidTextError      not text: wrong type, lone surrogates, bad roles
│   ├── EmptyTextError        the prompt or the response is empty
│   └── SequenceTooLongError  over the model's token limit
├── ModelError            a checkpoint cannot be served or trained as a reward model
│   ├── HeadError             the head is missing or does not give one reward
│   ├── ManifestError         reward_manifest.json is unreadable or of another schema
│   └── GoldenMismatchError   the golden samples' rewards could not be reproduced
├── NoUncertaintyError    a ranking that is averse to risk needs uncertainties, and the checkpoint has none
└── NonFiniteRewardError  a forward pass gave NaN or infinity; no reward is invented
```

Each error has a `code`, stable and in snake case, that clients may match on. The message says what is wrong, where, and
what to do; it never contains a prompt or a response. An error is a value: it is not changed after it is made, and
`about` returns a copy for another field. Errors know nothing of HTTP: the service keeps the one table that maps them to
statuses.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self


class MarginRMError(Exception):
    """Base of every error that marginrm raises on purpose.

    Args:
        message: What is wrong, where, and what to do. A message may name its field as `{param}`.
        code: Replaces the code of the class where a more exact one is known, such as that of a server's reply.
        param: The field that is wrong, such as `prompt` or `candidates[3]`, if there is one.

    Attributes:
        code: Stable identifier in snake case.
        param: The field that is wrong, or None.
    """

    default_code: ClassVar[str] = "marginrm_error"

    def __init__(self, message: str = "", *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.param = param

    def __str__(self) -> str:
        """Returns the message with its field's name filled in."""
        return super().__str__().replace("{param}", self.param or "the text")

    def __reduce__(self) -> tuple[Any, ...]:
        """Supports pickling and copying by attributes, because the constructors of subclasses differ."""
        return _restored, (type(self), self.args), self.__dict__

    def about(self, param: str) -> Self:
        """Returns a copy of this error that is about the field `param`."""
        twin: Self = _restored(type(self), self.args)
        twin.__dict__.update(self.__dict__)
        twin.__cause__ = self.__cause__
        twin.param = param
        return twin


class DataError(MarginRMError):
    """A data file, or a row of one, cannot be used. The message starts with `path:` or `path:line:`.

    Args:
        message: What is wrong, led by the place.
        reason: The kind of fault in a few words, by which unusable rows are counted. It holds nothing of the row.
        source: `path:line` of the row; None if the fault is not one of a single row.
    """

    default_code = "invalid_data"

    def __init__(self, message: str, *, reason: str = "unusable", source: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.source = source

    @classmethod
    def of_row(cls, source: str, reason: str, detail: str) -> Self:
        """Returns the error of one row.

        Args:
            source: `path:line`.
            reason: The kind of fault in a few words.
            detail: What is wrong and what is expected.
        """
        return cls(f"{source}: {detail}", reason=reason, source=source)


class ConfigError(MarginRMError):
    """A setting cannot be used. The message names the key and the accepted values."""

    default_code = "invalid_config"


class CalibrationError(MarginRMError):
    """Margins or targets from which nothing can be fitted: there are none, or their shapes differ."""

    default_code = "invalid_calibration"


class EncodingError(MarginRMError):
    """One (prompt, response) cannot be turned into token ids.

    Args:
        message: What is wrong and what to do.
        code: As for `MarginRMError`.
        param: The field that is wrong.
        reason: The kind of fault in a few words, by which unusable texts are counted; that of the class by default.
    """

    default_code = "invalid_input"
    default_reason: ClassVar[str] = "unusable texts"

    def __init__(
        self, message: str = "", *, code: str | None = None, param: str | None = None, reason: str | None = None
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.reason = reason or self.default_reason

    def __str__(self) -> str:
        """Returns the message, which names its field; a message that does not is led by the field's name."""
        text = super().__str__()
        return f"{self.param}: {text}" if self.param and self.param not in text else text

    def for_response(self, param: str) -> Self:
        """Returns this error about the response that the caller knows as `param`.

        An error about the prompt is returned as it is.
        """
        return self.about(param) if self.param in {None, "response"} else self


class InvalidTextError(EncodingError):
    """The value is not a text that a tokenizer can take."""

    default_code = "invalid_text"
    default_reason = "invalid text"


class EmptyTextError(EncodingError):
    """The prompt or the response is empty or only white space."""

    default_code = "empty_text"
    default_reason = "empty text"


class SequenceTooLongError(EncodingError):
    """The encoded sequence is longer than the model takes.

    Args:
        tokens: Length of the sequence in tokens, all special tokens included.
        limit: The model's limit in tokens.
        message: Replaces the default message where it needs to say more.
        param: The field that is too long.
    """

    default_code = "sequence_too_long"
    default_reason = "too long"

    def __init__(self, tokens: int, limit: int, message: str | None = None, *, param: str | None = None) -> None:
        super().__init__(
            message
            or f"{tokens:,} tokens; this model takes {limit:,}. Shorten the text, or ask for truncation of the prompt.",
            param=param,
        )
        self.tokens = tokens
        self.limit = limit


class ModelError(MarginRMError):
    """A checkpoint cannot be used as a reward model."""

    default_code = "invalid_model"


class HeadError(ModelError):
    """The checkpoint's head is missing, randomly initialised, or does not give one reward per sequence."""

    default_code = "invalid_head"


class ManifestError(ModelError):
    """`reward_manifest.json` cannot be read, or its schema version is not known."""

    default_code = "invalid_manifest"


class GoldenMismatchError(ModelError):
    """The loaded model does not reproduce the rewards that its manifest recorded."""

    default_code = "golden_mismatch"


class NoUncertaintyError(MarginRMError):
    """The rewards carry no uncertainty, because nothing in their checkpoint says how sure they are."""

    default_code = "no_uncertainty"

    def __init__(
        self,
        message: str = "risk_averse needs the uncertainty of rewards, and this model has none. `marginrm calibrate "
        "--uncertainty` adds it to a checkpoint whose head ends in a linear layer; without it, leave risk_averse out.",
    ) -> None:
        super().__init__(message)


class NonFiniteRewardError(MarginRMError):
    """The forward pass gave NaN or infinity for a response."""

    default_code = "non_finite_reward"


def _restored(kind: type[MarginRMError], args: tuple[Any, ...]) -> Any:
    """Makes an error without calling its constructor; its attributes are set afterwards."""
    return kind.__new__(kind, *args)
