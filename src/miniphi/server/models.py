"""What is served, and whether it works: /v1/models, /health, /ready, /version."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from miniphi.server.dependencies import Service
from miniphi.server.errors import ApiError
from miniphi.server.service import ModelService
from miniphi.server.sse import json_response
from miniphi.version import __version__

__all__ = ["router"]

router = APIRouter(tags=["server"])


@router.get("/v1/models", summary="List the models")
@router.get("/openai/v1/models", include_in_schema=False)
@router.get("/openai/models", include_in_schema=False)
async def list_models(service: Service) -> Response:
    """List the names that the model is served under."""
    return json_response({"object": "list", "data": [_model(service, name) for name in service.names]})


@router.get("/v1/models/{model:path}", summary="Describe a model")
async def show_model(model: str, service: Service) -> Response:
    """Describe one model."""
    service.check_model(model)
    return json_response(_model(service, model))


def _model(service: ModelService, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "miniphi",
        "root": service.llm.name,
        "max_model_len": service.llm.context,
    }


@router.get("/health", summary="Whether the process works")
async def health(service: Service) -> Response:
    """Say `ok` while the engine can compute; 503 means that only a new process helps."""
    if service.failure is not None:
        raise ApiError(503, f"the engine has ended: {service.failure}", code="engine_dead")
    return json_response({"status": "ok"})


@router.get("/ready", summary="Whether requests are taken")
async def ready(service: Service) -> Response:
    """Say `ready` while requests are taken; 503 before and after that."""
    if not service.is_ready:
        raise ApiError(503, "requests are not taken now", code="not_ready")
    return json_response({"status": "ready"})


@router.get("/version", summary="The version of the server")
async def version() -> Response:
    """Return miniphi's version."""
    return json_response({"version": __version__})
