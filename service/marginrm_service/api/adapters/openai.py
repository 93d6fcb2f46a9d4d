"""What OpenAI's clients ask beyond `GET /v1/models`: one model by its name."""

from __future__ import annotations

from fastapi import APIRouter

from marginrm.schemas import ModelCard
from marginrm_service.api.native import ERRORS
from marginrm_service.state import ServiceOf

router = APIRouter()


@router.get("/v1/models/{model}", responses={404: ERRORS[404]})
async def model_card(model: str, service: ServiceOf) -> ModelCard:
    """Returns one model's card."""
    return service.registry.get(model).card()
