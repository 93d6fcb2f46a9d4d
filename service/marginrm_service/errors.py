"""What can go wrong between a request and its reward, beyond what the library knows of.

```
MarginRMError
└── ServiceError
    ├── UnknownModelError      no model of that name is served
    ├── RequestTooLargeError   one request is more work than the queue may ever hold
    ├── ForwardFailedError     the forward pass raised for this response, and only for it
    ├── TokenizerFailedError   the tokenizer itself failed on this text, and only on it
    ├── ClientGoneError        the client hung up before its answer was ready
    ├── DeadlineExceededError  the request's time was up before its answer was ready
    ├── InvalidHeaderError     a header that the server reads cannot be understood
    ├── LastModelError         the only model that is served cannot be unloaded
    └── UnavailableError       not now: try again after `retry_after` seconds
        ├── NotReadyError          a model is loading, or could not be loaded
        ├── DrainingError          the server is about to leave
        ├── OverloadedError        the queue is full
        │   └── WouldBeLateError       it is so long that the answer would come after the request's deadline
        └── EngineStoppedError     the worker of a model has ended
```

None of them knows of HTTP; `http_errors` keeps the one table.
"""

from __future__ import annotations

from marginrm.errors import MarginRMError


class ServiceError(MarginRMError):
    """Base of the service's own errors."""

    default_code = "service_error"


class UnknownModelError(ServiceError):
    """No model of that name is served."""

    default_code = "unknown_model"


class RequestTooLargeError(ServiceError):
    """A single request holds more tokens than the queue may ever hold."""

    default_code = "request_too_large"


class ForwardFailedError(ServiceError):
    """The forward pass raised for this response alone; others of its step were scored."""

    default_code = "forward_failed"


class TokenizerFailedError(ServiceError):
    """The tokenizer raised on this text alone, which is no fault of the text's; others of its request were scored."""

    default_code = "tokenizer_failed"


class ClientGoneError(ServiceError):
    """The client closed its connection; nobody will read the answer."""

    default_code = "client_gone"


class DeadlineExceededError(ServiceError):
    """The request's time was up; what was not computed yet has left the queue."""

    default_code = "deadline_exceeded"


class InvalidHeaderError(ServiceError):
    """A header that the server reads cannot be understood. `param` is its name."""

    default_code = "invalid_header"


class LastModelError(ServiceError):
    """The only model that is served cannot be unloaded."""

    default_code = "last_model"


class UnavailableError(ServiceError):
    """The server cannot take this request now.

    Args:
        message: What is the matter.
        retry_after: Seconds after which a new try makes sense, at least 1.
    """

    default_code = "unavailable"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotReadyError(UnavailableError):
    """The model is loading, or could not be loaded."""

    default_code = "not_ready"


class DrainingError(UnavailableError):
    """The server finishes what it has accepted and takes nothing more."""

    default_code = "draining"


class OverloadedError(UnavailableError):
    """The queue is full."""

    default_code = "overloaded"


class WouldBeLateError(OverloadedError):
    """By the measured rate the answer would come after the request's deadline."""

    default_code = "would_be_late"


class EngineStoppedError(UnavailableError):
    """A model's worker has ended, by a fault or because the model was unloaded."""

    default_code = "engine_stopped"
