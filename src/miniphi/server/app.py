"""The web application: routes, what every answer carries, and how failures become answers."""

import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miniphi.errors import MiniphiError
from miniphi.server import chat, completions, metrics, models, tokens
from miniphi.server.errors import ApiError
from miniphi.server.metrics import Metrics
from miniphi.server.service import ModelService
from miniphi.server.sse import json_response
from miniphi.version import __version__

__all__ = ["create_app"]

log = logging.getLogger("miniphi.server")


def create_app(service: ModelService) -> FastAPI:
    """Return the application that serves a model; the engine's thread lives as long as its lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="miniphi",
        version=__version__,
        description="A small language model behind the OpenAI API.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = service
    service.observe(Metrics(service))
    for room in (chat, completions, models, tokens, metrics):
        app.include_router(room.router)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(MiniphiError, _on_failure)
    app.add_exception_handler(Exception, _on_failure)
    app.add_middleware(_Envelope, max_body_bytes=service.limits.max_body_bytes)
    return app


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.status >= 500 and error.__cause__ is not None:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error.__cause__)
    return json_response(error.body(), error.status, error.headers)


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return json_response(_first_problem(error.errors()).body(), 400)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # the body could not be read, and this is why
        return await _on_api_error(request, error.__cause__)
    message = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
    return json_response(ApiError(error.status_code, message).body(), error.status_code, error.headers)


async def _on_failure(request: Request, error: Exception) -> Response:
    log.error("%s %s failed: %s", request.method, request.url.path, error)  # of a bug, the server logs the traceback
    answer = ApiError.of(error)
    return json_response(answer.body(), answer.status, answer.headers)


def _first_problem(problems: Any) -> ApiError:
    """Say what is wrong with a body: an unknown field rather than anything else, and of a union its last complaint."""
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    path = [part for part in problem["loc"] if part != "body"]
    field = _field_name(path)
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem['ctx']['error']}", code="invalid_json")
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"the field {field!r} is not supported", param=field, code="unknown_parameter")
    if problem["type"] == "missing":
        what = f"the field {field!r} is missing" if field else "the body is missing"
        return ApiError(400, what, param=field, code="missing_required_parameter")
    message = problem["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{field}: {message}" if field else message, param=field, code="invalid_value")


def _field_name(path: list[Any]) -> str | None:
    """Return `messages[0].role` of its parts; names of a union's members are not part of the path."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):
            name += f".{part}" if name else part
    return name or None


class _Envelope:
    """What every answer has: an id, the time it took; and a bound on what comes in."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        request_id = f"req_{secrets.token_hex(12)}"
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise ApiError(413, f"the body is larger than {self._max_body_bytes} bytes", code="body_too_large")
            return message

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                took_ms = round(1000 * (time.perf_counter() - started_s))
                message["headers"] += [
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", str(took_ms).encode()),
                    (b"openai-version", b"2020-10-01"),
                ]
            await send(message)

        await self._app(scope, counted, stamped)
