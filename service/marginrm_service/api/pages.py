"""The playground, the models' pages and the API's description: pages that work offline and have no inline code."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

import marginrm.figures

_FOLDERS = (Path(__file__).parent / "static", Path(marginrm.figures.__file__).parent)  # the second shared with reports
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = {file.name: file for folder in _FOLDERS for file in sorted(folder.iterdir()) if file.suffix in _TYPES}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def playground() -> Response:
    """Serves the page that ranks responses and compares models."""
    return _page("playground.html")


@router.get("/models/{name}")
async def model(name: str) -> Response:
    """Serves the page that shows `/v1/models/{name}`. The page reports a name that is unknown."""
    return _page("model.html")


@router.get("/docs")
async def documentation() -> Response:
    """Serves the page that renders `/openapi.json`."""
    return _page("docs.html")


@router.get("/page/{name}")
async def asset(name: str) -> Response:
    """Serves a script, a style sheet or an image of the pages."""
    return _page(name)


def _page(name: str) -> Response:
    file = _FILES.get(name)
    if file is None:
        raise HTTPException(404)
    return FileResponse(file, media_type=_TYPES[file.suffix], headers={"Cache-Control": "no-cache"})
