"""Every error the library raises on purpose, as one tree.

```
MarginRMError
├── DataError             a file row is unusable; names path:line and field
├── ConfigError           a training or service setting is unusable; names the key
├── EncodingError         one (prompt, response) cannot become token ids
│   ├── InvalidTextError      not text: wrong type, lone surrogates, bad roles
│   ├── EmptyTextError        the prompt or the response is empty
│   └── SequenceTooLongError  over the model's token limit
├── ModelError            a checkpoint cannot be served or trained as a reward model
│   ├── HeadError             the head is missing or does not give one reward
│   ├── ManifestError         reward_manifest.json is unreadable or of another schema
│   └── GoldenMismatchError   the golden samples' rewards could not be reproduced
└── NonFiniteRewardError  a forward pass gave NaN or infinity; no reward is invented
```

Each error has a `code`, stable and in snake case, that clients may match on; the message says what is wrong, where,
and what to do. Messages never contain a prompt or a response. None of them knows of HTTP: the service keeps the one
table that maps them to statuses.
"""

from __future__ import annotations

from typing import ClassVar


class MarginRMError(Exception):
    """Base of every error that marginrm raises on purpose."""

    code: ClassVar[str] = "marginrm_error"


class DataError(MarginRMError):
    """A row of a data file cannot be used. The message starts with `path:line:`."""

    code = "invalid_data"


class ConfigError(MarginRMError):
    """A setting cannot be used. The message names the key and the accepted values."""

    code = "invalid_config"


class EncodingError(MarginRMError):
    """One (prompt, response) cannot be turned into token ids.

    Args:
        message: What is wrong and what to do, without the text itself.
        param: The field that is wrong, such as `prompt` or `response`.
    """

    code = "invalid_input"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidTextError(EncodingError):
    """The value is no text that a tokenizer can take."""

    code = "invalid_text"


class EmptyTextError(EncodingError):
    """The prompt or the response is empty or only white space."""

    code = "empty_text"


class SequenceTooLongError(EncodingError):
    """The encoded sequence is longer than the model takes.

    Args:
        tokens: Length of the sequence in tokens, all special tokens included.
        limit: The model's limit in tokens.
        message: Replaces the default message where it needs to say more.
        param: The field that is too long.
    """

    code = "sequence_too_long"

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

    code = "invalid_model"


class HeadError(ModelError):
    """The checkpoint's head is missing, randomly initialised, or does not give one reward per sequence."""

    code = "invalid_head"


class ManifestError(ModelError):
    """`reward_manifest.json` cannot be read, or its schema version is not known."""

    code = "invalid_manifest"


class GoldenMismatchError(ModelError):
    """The loaded model does not reproduce the rewards that its manifest recorded."""

    code = "golden_mismatch"


class NonFiniteRewardError(MarginRMError):
    """The forward pass gave NaN or infinity for a response."""

    code = "non_finite_reward"
