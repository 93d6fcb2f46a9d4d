"""Pages for people: the playground at `/` and the API's description at `/docs`. They work offline, with no inline code."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

_FOLDER = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = {file.name: file for file in sorted(_FOLDER.iterdir()) if file.suffix in _TYPES}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def playground() -> Response:
    """Serves the page that compares two responses and ranks several."""
    return _page("playground.html")


@router.get("/docs")
async def documentation() -> Response:
    """Serves the page that renders `/openapi.json`."""
    return _page("docs.html")


@router.get("/page/{name}")
async def asset(name: str) -> Response:
    """Serves what the pages are made of."""
    return _page(name)


def _page(name: str) -> Response:
    file = _FILES.get(name)
    if file is None:
        raise HTTPException(404)
    return FileResponse(file, media_type=_TYPES[file.suffix], headers={"Cache-Control": "no-cache"})
