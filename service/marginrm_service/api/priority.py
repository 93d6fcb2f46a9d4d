"""Which of the two classes a request belongs to: somebody waits for it, or a job works through it."""

from __future__ import annotations

from starlette.requests import Request

from marginrm_service.errors import InvalidHeaderError

HEADER = "X-Priority"
_CLASSES = {"interactive": False, "bulk": True}


def is_bulk(request: Request) -> bool:
    """Returns whether a request takes the room that interactive ones leave, by its `X-Priority`; they are the default.

    Raises:
        InvalidHeaderError: The header names no class.
    """
    asked = request.headers.get(HEADER, "interactive")
    if asked not in _CLASSES:
        raise InvalidHeaderError(f"{HEADER} must be interactive or bulk.", param=HEADER)
    return _CLASSES[asked]
