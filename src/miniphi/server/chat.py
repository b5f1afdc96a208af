"""POST /v1/chat/completions, and the same under Azure's names.

messages -> chat template -> engine -> chunks -> one object, or one event per chunk.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from miniphi.llm import Chunk, LiveStream, TokenLogprob
from miniphi.server.answers import Stamp, choice_logprobs, usage_of
from miniphi.server.dependencies import Service
from miniphi.server.errors import ApiError
from miniphi.server.schemas import ChatRequest
from miniphi.server.sse import event_stream, json_response, unless_gone

__all__ = ["router"]

router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions", summary="Answer a conversation")
@router.post("/openai/v1/chat/completions", include_in_schema=False)
async def create(body: ChatRequest, request: Request, service: Service) -> Response:
    """Answer a conversation, in one piece or as a stream of events."""
    service.check_model(body.model)
    return await _answer(body, request, service)


@router.post("/openai/deployments/{deployment}/chat/completions", summary="Answer a conversation, by Azure's route")
async def create_in_deployment(
    deployment: str,
    body: ChatRequest,
    request: Request,
    service: Service,
    api_version: Annotated[str | None, Query(alias="api-version")] = None,
) -> Response:
    """Do the same for a deployment, whose name takes the place of `model`; every `api-version` is the same."""
    service.check_model(deployment)
    return await _answer(body, request, service)


async def _answer(body: ChatRequest, request: Request, service: Service) -> Response:
    messages = [message.to_message() for message in body.messages]
    try:
        prompt = await service.prepare(service.llm.chat_request, messages, body.to_sampling())
        (stream,) = service.open([prompt])
    except Exception as error:
        raise ApiError.of(error, body.blame(error, "messages")) from error
    stamp = Stamp.new("chatcmpl", service)
    if not body.stream:
        return json_response(await unless_gone(request, _whole(stream, body, stamp)))
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return event_stream(_events(stream, body, stamp, include_usage))


async def _whole(stream: LiveStream, body: ChatRequest, stamp: Stamp) -> dict[str, Any]:
    """Return the answer as one object."""
    chunks: list[list[Chunk]] = [[] for _ in range(body.n or 1)]
    async with stream:
        async for chunk in stream:
            chunks[chunk.index].append(chunk)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(chunk.text for chunk in pieces), "refusal": None},
            "logprobs": _logprobs([token for chunk in pieces for token in stream.spoken(chunk)], body),
            "finish_reason": pieces[-1].finish_reason,
        }
        for index, pieces in enumerate(chunks)
    ]
    return stamp.head("chat.completion") | {"choices": choices, "usage": usage_of(stream.usage)}


async def _events(
    stream: LiveStream, body: ChatRequest, stamp: Stamp, include_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Yield the answer chunk by chunk; each choice begins with its role and ends with its reason."""
    head = stamp.head("chat.completion.chunk")
    tail: dict[str, Any] = {"usage": None} if include_usage else {}

    def event(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return head | {"choices": [choice]} | tail

    async with stream:
        for index in range(body.n or 1):
            yield event(index, {"role": "assistant", "content": "", "refusal": None})
        async for chunk in stream:
            tokens = stream.spoken(chunk)
            if chunk.text or tokens:
                yield event(chunk.index, {"content": chunk.text}, _logprobs(tokens, body))
            if chunk.finish_reason is not None:
                yield event(chunk.index, {}, None, chunk.finish_reason)
        if include_usage:
            yield head | {"choices": [], "usage": usage_of(stream.usage)}


def _logprobs(tokens: list[TokenLogprob], body: ChatRequest) -> dict[str, Any] | None:
    return {"content": choice_logprobs(tokens), "refusal": None} if body.logprobs else None
