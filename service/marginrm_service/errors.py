"""Errors between a request and its reward, beyond those of the library.

```
MarginRMError
└── ServiceError
    ├── UnknownModelError      no model has that name
    ├── RequestTooLargeError   one request alone exceeds the queue
    ├── ForwardFailedError     the forward pass raised for this response alone
    ├── TokenizerFailedError   the tokenizer failed on this text alone
    ├── ClientGoneError        the client disconnected before its reply was ready
    ├── DeadlineExceededError  the request's deadline passed before its reply was ready
    ├── InvalidHeaderError     a header has an invalid value
    ├── LastModelError         the only model cannot be unloaded
    ├── UpstreamRefusedError   the server that computes a model refuses these texts, or is not what it should be
    └── UnavailableError       unavailable now; a retry makes sense after `retry_after` seconds
        ├── NotReadyError          a model is loading, or could not be loaded
        ├── DrainingError          the server is shutting down
        ├── OverloadedError        the queue is full
        │   └── WouldBeLateError       the reply would come after the request's deadline
        ├── EngineStoppedError     the worker of a model has ended
        └── UpstreamUnavailableError  the server that computes a model does not answer, or must not be used
```

Errors know nothing of HTTP; `api.errors` has the one table of statuses.
"""

from __future__ import annotations

from marginrm.errors import MarginRMError


class ServiceError(MarginRMError):
    """Base of the service's own errors."""

    default_code = "service_error"


class UnknownModelError(ServiceError):
    """No model has that name."""

    default_code = "unknown_model"


class RequestTooLargeError(ServiceError):
    """A single request has more tokens than the queue may hold."""

    default_code = "request_too_large"


class ForwardFailedError(ServiceError):
    """The forward pass raised for this response alone; others of its step were scored."""

    default_code = "forward_failed"


class TokenizerFailedError(ServiceError):
    """The tokenizer raised on this text alone, which is a fault of the tokenizer; others of its request were scored."""

    default_code = "tokenizer_failed"


class ClientGoneError(ServiceError):
    """The client closed its connection, so the reply cannot be delivered."""

    default_code = "client_gone"


class DeadlineExceededError(ServiceError):
    """The request's deadline passed. The part that was not computed yet has left the queue."""

    default_code = "deadline_exceeded"


class InvalidHeaderError(ServiceError):
    """A header has an invalid value. `param` is its name."""

    default_code = "invalid_header"


class LastModelError(ServiceError):
    """The only model cannot be unloaded."""

    default_code = "last_model"


class UpstreamRefusedError(ServiceError):
    """The server that computes a model's rewards refuses a request, or does not answer as such a server does."""

    default_code = "upstream_refused"


class UnavailableError(ServiceError):
    """The server cannot accept this request now.

    Args:
        message: The reason.
        retry_after: Seconds after which a retry makes sense, at least 1.
    """

    default_code = "unavailable"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotReadyError(UnavailableError):
    """The model is loading, or could not be loaded."""

    default_code = "not_ready"


class DrainingError(UnavailableError):
    """The server finishes the requests that it has accepted, and accepts no others."""

    default_code = "draining"


class OverloadedError(UnavailableError):
    """The queue is full."""

    default_code = "overloaded"


class WouldBeLateError(OverloadedError):
    """By the measured rate the reply would come after the request's deadline."""

    default_code = "would_be_late"


class EngineStoppedError(UnavailableError):
    """A model's worker has ended, by a fault or because the model was unloaded."""

    default_code = "engine_stopped"


class UpstreamUnavailableError(UnavailableError):
    """The server that computes a model's rewards does not answer, takes no requests, or gives other rewards than before."""

    default_code = "upstream_unavailable"
