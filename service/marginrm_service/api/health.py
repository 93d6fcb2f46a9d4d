"""Liveness, readiness and metrics, for orchestrators and Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response

from marginrm.schemas import ErrorReply
from marginrm_service.state import ServiceOf
from marginrm_service.telemetry.metrics import CONTENT_TYPE

router = APIRouter(tags=["operations"])


@router.get("/healthz", responses={503: {"model": ErrorReply, "description": "Only a new process helps."}})
async def healthz(service: ServiceOf) -> dict[str, str]:
    """Reports that the process is alive, also while models load; 503 if a model's worker has died."""
    service.registry.check_alive()
    return {"status": "alive"}


@router.get(
    "/readyz", responses={503: {"model": ErrorReply, "description": "Not ready; the message names the reason."}}
)
async def readyz(service: ServiceOf) -> dict[str, str]:
    """Reports readiness: every model has loaded and passed its self-test, and the server is not shutting down."""
    service.check_ready()
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
async def metrics(service: ServiceOf) -> Response:
    """Returns the metrics in Prometheus' text format."""
    return Response(await service.scrape(), media_type=CONTENT_TYPE)
