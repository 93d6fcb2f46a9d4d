"""Maps errors to HTTP: one table of statuses, and one shape, `{"error": {"code", "message", "param"?, "request_id"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from marginrm.errors import EncodingError, MarginRMError, NoUncertaintyError
from marginrm.schemas import ErrorBody, ErrorReply
from marginrm_service import errors
from marginrm_service.telemetry.logs import request_id

_log = logging.getLogger(__name__)

CLIENT_GONE = 499  # nginx's number; it is never received, but it is counted

# Error -> status, found by ancestry. Any other error is a fault of the server: 500, without details.
STATUSES: dict[type[MarginRMError], int] = {
    EncodingError: 422,
    NoUncertaintyError: 422,
    errors.UnknownModelError: 404,
    errors.RequestTooLargeError: 413,
    errors.ClientGoneError: CLIENT_GONE,
    errors.DeadlineExceededError: 504,
    errors.InvalidHeaderError: 422,
    errors.LastModelError: 409,
    errors.OverloadedError: 429,
    errors.UnavailableError: 503,
    MarginRMError: 500,
}
# OpenAPI descriptions of the error replies of scoring routes.
ERROR_REPLIES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "The body is not valid JSON."},
    404: {"model": ErrorReply, "description": "No model has that name."},
    413: {"model": ErrorReply, "description": "The body, or the work in it, is too large."},
    422: {"model": ErrorReply, "description": "Wrong shape; or the only item's text is unusable."},
    429: {"model": ErrorReply, "description": "The queue is full; try again after `Retry-After` seconds."},
    503: {"model": ErrorReply, "description": "Loading or shutting down; try again after `Retry-After` seconds."},
    504: {"model": ErrorReply, "description": "Not done within `X-Request-Timeout` seconds, or the server's default."},
}
# Errors that FastAPI and Starlette raise themselves.
_CODES = {400: "malformed_request", 404: "not_found", 405: "method_not_allowed"}
_OVERLOAD_STATUS = "overload_status"
_INTERNAL = "The server failed on this request. The server's log has the details under this request id."


class BodyError(HTTPException):
    """A request body that cannot be read. While it reads a body, FastAPI lets no other exception pass.

    Args:
        status: Status of the reply.
        code: Stable identifier of the error.
        message: The fault, and its cure.
        close: The rest of the body is not read, so the connection cannot be used again.
    """

    def __init__(self, status: int, code: str, message: str, *, close: bool = False) -> None:
        super().__init__(status, message, {"Connection": "close"} if close else None)
        self.code = code


def install(app: FastAPI) -> None:
    """Gives every error of an app the one shape."""
    app.add_exception_handler(MarginRMError, _on_marginrm_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)


def status_of(error: MarginRMError) -> int:
    """Returns the status for an error, by its nearest ancestor in the table."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def error_body(error: MarginRMError) -> ErrorBody:
    """Returns an error as it appears in place of a reward."""
    return ErrorBody(code=error.code, message=str(error), param=error.param)


def error_response(
    status: int, code: str, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Builds an error reply."""
    body = ErrorBody(code=code, message=message, param=param, request_id=request_id.get())
    return JSONResponse(ErrorReply(error=body).model_dump(), status, headers=dict(headers or {}))


def internal_error() -> JSONResponse:
    """Builds the reply to a fault of the server."""
    return error_response(500, "internal_error", _INTERNAL)


def body_too_large(max_bytes: int) -> BodyError:
    """Returns the error of a body above the limit."""
    message = f"The body is larger than {max_bytes:,} bytes, the limit of this server. Send it in several requests."
    return BodyError(413, "body_too_large", message)


def unfinished() -> JSONResponse:
    """Builds the reply to a request that was accepted and will not be finished."""
    return error_reply(errors.DrainingError("The server shut down before this request was done. Send it again."))


def set_overload_status(scope: Scope, status: int) -> None:
    """Sets the status with which a request is answered when the queue is full."""
    scope.setdefault("state", {})[_OVERLOAD_STATUS] = status


def error_reply(error: MarginRMError, scope: Scope | None = None) -> JSONResponse:
    """Builds the reply to an error, with `Retry-After` where a retry makes sense.

    Args:
        error: The error.
        scope: Of the request, if `set_overload_status` may have been called for it.
    """
    status = status_of(error)
    if isinstance(error, errors.OverloadedError) and scope:
        status = scope.get("state", {}).get(_OVERLOAD_STATUS, status)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, errors.UnavailableError) else {}
    return error_response(status, error.code, str(error), param=error.param, headers=headers)


async def _on_marginrm_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MarginRMError)
    reply = error_reply(error, request.scope)
    if reply.status_code == HTTPStatus.INTERNAL_SERVER_ERROR and not isinstance(error, errors.ServiceError):
        _log.error("A request failed: %s", error.code, exc_info=error)
    return reply


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyError):
        return error_response(error.status_code, error.code, error.detail, headers=error.headers)
    code = _CODES.get(error.status_code, "http_error")
    messages = {
        400: "The body could not be read as JSON.",
        404: "This route does not exist. GET /docs lists all routes.",
        405: f"This route does not take {request.method}. GET /docs lists the methods of each route.",
    }
    message = messages.get(error.status_code, HTTPStatus(error.status_code).phrase)
    return error_response(error.status_code, code, message, headers=error.headers)


async def _on_invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    faults: Sequence[Any] = error.errors()
    first = faults[0]
    if first["type"] == "json_invalid":
        position = first["loc"][-1]
        reason = first.get("ctx", {}).get("error", "it ends too early")
        return error_response(400, "malformed_json", f"The body is not valid JSON: {reason} at character {position}.")
    if first["type"] == "missing" and tuple(first["loc"]) == ("body",):
        return error_response(400, "malformed_json", "The body is empty. Send a JSON object; GET /docs has examples.")
    if not _is_json(request.headers.get("content-type")):
        return error_response(
            415, "unsupported_media_type", "Send the body as JSON, with the header Content-Type: application/json."
        )
    path = _path(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    more = f" ({len(faults) - 1} more faults)" if len(faults) > 1 else ""
    where = f"{path}: " if path else ""
    return error_response(422, "invalid_request", f"{where}{message}{more}", param=path or None)


def _is_json(content_type: str | None) -> bool:
    kind = (content_type or "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _path(location: Sequence[int | str]) -> str:
    """Writes `("body", "pairs", 3, "prompt")` as `pairs[3].prompt`. A name may be the client's, so it is shortened."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "body" or path:
            name = part[:64].encode("ascii", "backslashreplace").decode()
            path += f".{name}" if path else name
    return path
