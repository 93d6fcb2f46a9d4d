"""Errors -> HTTP. The one table, and the one shape: `{"error": {"code", "message", "param"?, "request_id"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from marginrm.errors import EncodingError, MarginRMError
from marginrm.schemas import ErrorBody, ErrorReply
from marginrm_service import errors
from marginrm_service.telemetry.logs import request_id

_log = logging.getLogger(__name__)

CLIENT_GONE = 499  # nginx's number; nobody receives it, but it is counted

# Error -> status, found by ancestry. What is not in it is a fault of ours: 500, without details.
STATUSES: dict[type[MarginRMError], int] = {
    EncodingError: 422,
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
# Faults that FastAPI and Starlette find by themselves.
_CODES = {400: "malformed_request", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_INTERNAL = "The server failed on this request. The server's log has the details under this request id."


def install(app: FastAPI) -> None:
    """Makes every error of an app come out in the one shape."""
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
    """Builds the reply to a fault of ours."""
    return error_response(500, "internal_error", _INTERNAL)


def unfinished() -> JSONResponse:
    """Builds the reply to a request that was accepted and will not be finished."""
    error = errors.DrainingError("The server left before this request was done. Send it again.")
    return error_response(503, error.code, str(error), headers={"Retry-After": str(error.retry_after)})


async def _on_marginrm_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MarginRMError)
    status = status_of(error)
    if isinstance(error, errors.OverloadedError):
        status = getattr(request.state, "overload_status", status)  # an adapter's client may want another
    if status == HTTPStatus.INTERNAL_SERVER_ERROR and not isinstance(error, errors.ServiceError):
        _log.error("A request failed: %s", error.code, exc_info=error)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, errors.UnavailableError) else {}
    return error_response(status, error.code, str(error), param=error.param, headers=headers)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "http_error")
    messages = {
        400: "The body could not be read as JSON.",
        404: "There is no such route. GET /docs lists those there are.",
        405: f"{request.method} is not what this route takes. GET /docs lists what each does.",
        413: f"The body is larger than the {request.app.state.service.settings.max_body_bytes:,} bytes that this "
        "server takes. Send the work in several requests.",
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
        return error_response(400, "malformed_json", f"The body is no JSON: {reason} at character {position}.")
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
    """`("body", "pairs", 3, "prompt")` -> `pairs[3].prompt`. Names of unknown fields are the client's: shortened."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "body" or path:
            name = part[:64].encode("ascii", "backslashreplace").decode()
            path += f".{name}" if path else name
    return path
