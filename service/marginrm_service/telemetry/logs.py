"""Logs as text or as JSON, one line an event, with the request's id and never with its content.

An exception is logged with its type and the lines of code that it came through, but without its message: messages of
other libraries may quote the text that caused them. A caller that knows a message to be harmless puts it into the log's
own message.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from marginrm.errors import MarginRMError

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}


def configure(log_format: Literal["text", "json"], level: str) -> None:
    """Sends all logs of the process to stderr in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("filelock", "httpcore", "httpx", "urllib3", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def adopt_transformers() -> None:
    """Makes transformers log through the root logger, and show progress bars only on a terminal. Imports it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, and the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats one event."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identity := request_id.get():
            entry["request_id"] = identity
        entry |= _extras(record)
        if record.exc_info and record.exc_info[1]:
            entry["exception"] = describe(record.exc_info[1])
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """`12:34:56 info message key=value request_id=...`."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats one event."""
        fields = _extras(record)
        if identity := request_id.get():
            fields["request_id"] = identity
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        parts = [time, record.levelname.lower(), record.getMessage(), *(f"{k}={v}" for k, v in fields.items())]
        line = " ".join(parts)
        if record.exc_info and record.exc_info[1]:
            line += "\n" + describe(record.exc_info[1])
        return line


def describe(error: BaseException) -> str:
    """Returns an exception's type and code path; its message only for our own errors, which never quote a text."""
    lines = traceback.format_tb(error.__traceback__)
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    lines.append(f"{name}: {error}" if isinstance(error, MarginRMError) else name)
    if cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        lines = [describe(cause), "\nwhich led to:\n", *lines]
    return "".join(lines).rstrip()


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
