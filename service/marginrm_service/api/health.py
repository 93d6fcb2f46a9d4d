"""Routes for machines that look after the server: liveness, readiness, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from marginrm.schemas import ErrorReply
from marginrm_service.state import ServiceOf

router = APIRouter(tags=["operations"])


@router.get("/healthz", responses={503: {"model": ErrorReply, "description": "Only a new process helps."}})
async def healthz(service: ServiceOf) -> dict[str, str]:
    """Says that the process is alive, also while models load; 503 if a model's worker has died."""
    service.registry.check_alive()
    return {"status": "alive"}


@router.get("/readyz", responses={503: {"model": ErrorReply, "description": "Not now; the message says why."}})
async def readyz(service: ServiceOf) -> dict[str, str]:
    """Says whether requests are welcome: every model has loaded, passed its self-test, and the server is to stay."""
    service.check_ready()
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
async def metrics(service: ServiceOf) -> Response:
    """Gives Prometheus its metrics."""
    service.registry.refresh_gauges()
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
