"""Loading, swapping and unloading models at run time, for holders of an admin key."""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from marginrm.errors import ModelError
from marginrm.schemas import ErrorReply, ModelCard
from marginrm.text import NAME_PATTERN
from marginrm_service.api.errors import error_response
from marginrm_service.settings import ModelSpec
from marginrm_service.state import ServiceOf

router = APIRouter(
    prefix="/admin",
    tags=["admin"],
    responses={
        401: {"model": ErrorReply, "description": "No admin key."},
        404: {"model": ErrorReply, "description": "No model has that name; or this server has no admin keys."},
        409: {"model": ErrorReply, "description": "The only model cannot be unloaded."},
        422: {"model": ErrorReply, "description": "The checkpoint cannot be served; nothing has changed."},
    },
)


class LoadRequest(BaseModel):
    """A model to serve under a name, new or in use."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=rf"^{NAME_PATTERN}$")
    path: str = Field(min_length=1, max_length=4096, description="Folder on the server, or Hugging Face Hub name.")


@router.post("/models", response_model=ModelCard)
async def load(body: LoadRequest, service: ServiceOf) -> ModelCard | Response:
    """Loads a model, and swaps it in under its name once it has passed its self-test.

    The reply is sent when the new model serves. The old one finishes the requests that it has accepted.
    """
    try:
        return await service.registry.load(ModelSpec(body.name, body.path))
    except ModelError as error:
        return error_response(422, error.code, str(error), param="path")


@router.delete("/models/{name}", status_code=204)
async def unload(name: str, service: ServiceOf) -> None:
    """Takes a model out of service. It finishes the requests that it has accepted."""
    await service.registry.unload(name)
