"""`GET /v1/models/{name}`: a served model in full, with its figures as SVG and the documents of its checkpoint."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from fastapi import APIRouter, Response
from starlette.exceptions import HTTPException

from marginrm.figures import drawings
from marginrm.manifest import DataFile, Manifest
from marginrm.model_schema import DriftState, GoldenTest, ModelDetail
from marginrm.schemas import ErrorReply
from marginrm_service.models.served_model import ServedModel
from marginrm_service.state import Service, ServiceOf

_MEDIA = {"report.html": "text/html; charset=utf-8", "README.md": "text/plain; charset=utf-8"}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorReply, "description": "No model has that name."}}

router = APIRouter(prefix="/v1/models/{name}", tags=["models"], responses=_NOT_FOUND)


@router.get("")
async def detail(name: str, service: ServiceOf) -> ModelDetail:
    """Describes one model: how it reads and computes, how it was trained, measured and calibrated, and its drift."""
    served = service.registry.get(name)
    manifest = served.manifest
    drift = _drift(service, served)
    return ModelDetail(
        **served.card().model_dump(),
        reading=_reading(served),
        golden=_golden(served),
        drift=drift,
        figures=list(_figures(manifest, drift)),
        documents=[document for document in _MEDIA if served.folder and (served.folder / document).is_file()],
        **(_recorded(manifest) if manifest else {}),
    )


@router.get("/figures/{figure}", response_class=Response, include_in_schema=False)
async def draw_figure(name: str, figure: str, service: ServiceOf) -> Response:
    """Draws one of the model's figures as SVG."""
    served = service.registry.get(name)
    draw = _figures(served.manifest, _drift(service, served)).get(figure)
    if draw is None:
        raise HTTPException(404)
    return Response(draw(), media_type="image/svg+xml")


@router.get("/documents/{document}", response_class=Response, include_in_schema=False)
async def serve_document(name: str, document: str, service: ServiceOf) -> Response:
    """Serves the report of the checkpoint's training, or its model card as plain text.

    The report is part of the checkpoint and not trusted: it runs in a sandbox, without an origin and without network.
    """
    folder = service.registry.get(name).folder
    file = folder / document if folder and document in _MEDIA else None
    if file is None or not file.is_file():
        raise HTTPException(404)
    content = file.read_bytes()
    headers = {"Content-Security-Policy": f"sandbox; default-src 'none'; style-src {_style_hashes(content)}"}
    return Response(content, media_type=_MEDIA[document], headers=headers)


def _style_hashes(html: bytes) -> str:
    """Returns the stylesheets of a document as a Content-Security-Policy names them."""
    digests = (hashlib.sha256(style).digest() for style in re.findall(rb"<style>(.*?)</style>", html, re.DOTALL))
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"


def _drift(service: Service, served: ServedModel) -> DriftState | None:
    return service.metrics.drift(served.name)


def _figures(manifest: Manifest | None, drift: DriftState | None) -> dict[str, Callable[[], str]]:
    """Returns the figures for which the model has numbers, in the order of the page."""
    return dict(_drawable(manifest, drift))


def _drawable(manifest: Manifest | None, drift: DriftState | None) -> Iterator[tuple[str, Callable[[], str]]]:
    calibration = manifest.calibration if manifest else None
    if manifest and drawings.strength_bars(manifest.metrics):
        yield "strength", lambda: drawings.strength_bars(manifest.metrics) or ""
    if calibration and calibration.margin_quantiles:
        yield "margins", lambda: drawings.margin_quantiles(calibration.margin_quantiles)
    if calibration and calibration.reliability:
        before = {"T = 1": calibration.reliability_before} if calibration.reliability_before else {}
        yield "reliability", lambda: drawings.reliability({**before, "calibrated": calibration.reliability})
    if calibration and calibration.risk_coverage:
        yield "risk-coverage", lambda: drawings.risk_coverage(calibration.risk_coverage)
    if manifest and manifest.best_of_n:
        yield "best-of-n", lambda: drawings.best_of_n({"model": manifest.best_of_n})
    if drift and drift.margins:
        yield "drift", lambda: drawings.drift(drift.expected, drift.seen, drift.edges)


def _recorded(manifest: Manifest) -> dict[str, Any]:
    """Returns the fields of the manifest under the names of `ModelDetail`."""
    return {
        "trained": manifest.created,
        "base_revision": manifest.base_revision,
        "method": manifest.method,
        "data": [_without_folders(file) for file in manifest.data],
        "reward_mean": manifest.reward_mean,
        "reward_std": manifest.reward_std,
        "calibration": manifest.calibration,
        "metrics": manifest.metrics,
        "best_of_n": manifest.best_of_n,
        "versions": manifest.versions,
    }


def _without_folders(file: DataFile) -> DataFile:
    """Returns a data file by its name alone: folders of the training machine are private."""
    return file.model_copy(update={"path": PurePosixPath(file.path).name or file.path})


def _reading(served: ServedModel) -> dict[str, Any]:
    """Returns how a text becomes a reward: the manifest's record, and what was found and decided at load."""
    recorded = served.manifest.encoding.model_dump() if served.manifest else {}
    found = served.reading.as_dict() if served.reading else {}
    if served.folder:
        found["checkpoint"] = served.folder.name  # the rest of its path is the server's
    return {"max_length": served.encoder.max_length, **recorded, **found}


def _golden(served: ServedModel) -> GoldenTest | None:
    manifest = served.manifest
    if not manifest or served.golden is None:
        return None
    tolerance = manifest.golden_tolerance.get(served.info.dtype)
    return GoldenTest(samples=len(manifest.golden), difference=served.golden, tolerance=tolerance)
