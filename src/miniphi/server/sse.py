"""Answers that come bit by bit: server-sent events, and the end of the work when the client has gone."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from miniphi.server.errors import ApiError

__all__ = ["event_stream", "json_response", "unless_gone"]

T = TypeVar("T")

_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # a proxy must pass each event on at once

log = logging.getLogger("miniphi.server")


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer of one piece."""
    return Response(orjson.dumps(content), status, dict(headers or {}), media_type="application/json")


def event_stream(
    events: AsyncIterator[Mapping[str, Any]], headers: Mapping[str, str] | None = None
) -> StreamingResponse:
    """Return events as they come, then `[DONE]`; a failure on the way becomes an event with an error object."""
    return StreamingResponse(_encode(events), headers=_HEADERS | dict(headers or {}), media_type="text/event-stream")


async def _encode(events: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield b"data: " + orjson.dumps(event) + b"\n\n"
    except Exception as error:
        answer = ApiError.of(error)
        if answer.status >= 500 and error is not answer:
            log.exception("a stream failed", exc_info=error)
        yield b"data: " + orjson.dumps(answer.body()) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it if the client goes away first.

    Raises: ApiError 499, which nobody will read.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
