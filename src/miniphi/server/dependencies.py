"""What routes ask FastAPI for."""

from typing import Annotated

from fastapi import Depends, Request

from miniphi.server.service import ModelService

__all__ = ["Service"]


def _service(request: Request) -> ModelService:
    service: ModelService = request.app.state.service
    return service


Service = Annotated[ModelService, Depends(_service)]
"""The model behind the server"""
