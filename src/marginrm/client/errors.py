"""The errors of client calls, as one tree.

```
RewardClientError
├── TransportError            no reply: connection refused, cut or timed out, after all retries
│   └── DeadlineError             the call's overall deadline passed
├── UnexpectedReplyError      a reply that is not a marginrm server's: a proxy's page, another service
├── ResponseError             the server refused or failed: status, code, message, request_id, retry_after
│   ├── InvalidRequestError       400, 413, 422
│   ├── UnauthorizedError         401, 403
│   ├── NotFoundError             404: no such model, or no such route
│   ├── OverloadedError           429, 503: full or draining, after all retries
│   └── ServerError               500, 502, 504
└── ItemScoreError            one pair or candidate that could not be scored: index, id, code, message, param
```

All of them are `MarginRMError`s. Batch verbs return `ItemScoreError`s in their item's place and raise the others.
"""

from __future__ import annotations

from marginrm.errors import MarginRMError


class RewardClientError(MarginRMError):
    """Base of the errors of a client call."""

    default_code = "client_error"


class TransportError(RewardClientError):
    """No reply: the connection was refused, broken or timed out."""

    default_code = "no_answer"


class DeadlineError(TransportError):
    """The call's overall deadline passed before a reply arrived."""

    default_code = "deadline_exceeded"


class UnexpectedReplyError(RewardClientError):
    """The reply is not one of a marginrm server."""

    default_code = "unexpected_reply"


class ResponseError(RewardClientError):
    """The server refused or failed.

    Args:
        status: HTTP status.
        code: The server's stable error code.
        message: The server's message.
        request_id: Id of the refused request in the server's log.
        retry_after: Seconds of the server's `Retry-After`, if it sent one.
        param: The field that is wrong, if there is one.
    """

    default_code = "refused"

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        request_id: str | None = None,
        retry_after: float | None = None,
        param: str | None = None,
    ) -> None:
        request = f" (request {request_id})" if request_id else ""
        super().__init__(f"HTTP {status} {code}: {message}{request}", code=code, param=param)
        self.status = status
        self.message = message
        self.request_id = request_id
        self.retry_after = retry_after


class InvalidRequestError(ResponseError):
    """400, 413 or 422: the request's shape or size is wrong. Sending it again cannot help."""


class UnauthorizedError(ResponseError):
    """401 or 403: the API key is missing or not accepted."""


class NotFoundError(ResponseError):
    """404: the server has no such model, or no such route."""


class OverloadedError(ResponseError):
    """429 or 503: the server is full or draining, and the retries are used up or would come too late."""


class ServerError(ResponseError):
    """Any other 5xx: the server failed."""


class ItemScoreError(RewardClientError):
    """One item of a request could not be scored.

    Args:
        index: Position of the pair or prompt in the call; 0 for the verbs that take one.
        code: The server's stable error code.
        message: The server's message.
        id: The item's id, if it had one.
        param: The field that is wrong, such as `candidates[3]`, if there is one.
    """

    default_code = "item_error"

    def __init__(
        self,
        index: int,
        code: str,
        message: str,
        id: str | None = None,  # noqa: A002 - the wire's word
        param: str | None = None,
    ) -> None:
        field = f" ({param})" if param and param not in message else ""
        super().__init__(f"item {index}: {code}: {message}{field}", code=code, param=param)
        self.index = index
        self.message = message
        self.id = id


_BY_STATUS: dict[int, type[ResponseError]] = {
    400: InvalidRequestError,
    401: UnauthorizedError,
    403: UnauthorizedError,
    404: NotFoundError,
    413: InvalidRequestError,
    422: InvalidRequestError,
    429: OverloadedError,
    503: OverloadedError,
}


def response_error(
    status: int, code: str, message: str, request_id: str | None, retry_after: float | None, param: str | None
) -> ResponseError:
    """Returns an error of the class that matches the status."""
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else ResponseError)
    return kind(status, code, message, request_id, retry_after, param)
