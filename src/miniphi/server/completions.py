"""POST /v1/completions: continue texts as they are.

One body may hold several prompts; they are computed together. With `echo` the prompt comes back in front of what was
generated, and with `logprobs` too it is scored, which is what evaluation harnesses ask for.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from miniphi.llm import Chunk, LiveStream, TokenLogprob, Usage
from miniphi.server.answers import Stamp, token_name, usage_of
from miniphi.server.dependencies import Service
from miniphi.server.errors import ApiError
from miniphi.server.schemas import CompletionRequest
from miniphi.server.service import ModelService
from miniphi.server.sse import event_stream, json_response, unless_gone

__all__ = ["router"]

router = APIRouter(tags=["completions"])


@router.post("/v1/completions", summary="Continue a text")
@router.post("/openai/v1/completions", include_in_schema=False)
async def create(body: CompletionRequest, request: Request, service: Service) -> Response:
    """Continue one or several texts, in one piece or as a stream of events."""
    service.check_model(body.model)
    return await _answer(body, request, service)


@router.post("/openai/deployments/{deployment}/completions", summary="Continue a text, by Azure's route")
async def create_in_deployment(
    deployment: str,
    body: CompletionRequest,
    request: Request,
    service: Service,
    api_version: Annotated[str | None, Query(alias="api-version")] = None,
) -> Response:
    """Do the same for a deployment, whose name takes the place of `model`; every `api-version` is the same."""
    service.check_model(deployment)
    return await _answer(body, request, service)


async def _answer(body: CompletionRequest, request: Request, service: ModelService) -> Response:
    is_scored = bool(body.echo) and body.logprobs is not None
    try:
        sampling = body.to_sampling()
        prompts = await service.prepare(
            lambda: [
                service.llm.completion_request(prompt, sampling, score_prompt=is_scored) for prompt in body.prompts
            ]
        )
        streams = service.open(prompts)
    except Exception as error:
        raise ApiError.of(error, body.blame(error, "prompt")) from error
    answers = [_Answer(body, service, stream, number) for number, stream in enumerate(streams)]
    stamp = Stamp.new("cmpl", service)
    if not body.stream:
        return json_response(await unless_gone(request, _whole(answers, stamp)))
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return event_stream(_events(answers, stamp, include_usage))


async def _whole(answers: "list[_Answer]", stamp: Stamp) -> dict[str, Any]:
    choices = [choice for group in await asyncio.gather(*(each.choices() for each in answers)) for choice in group]
    return stamp.head("text_completion") | {"choices": choices, "usage": usage_of(_sum(answers))}


async def _events(answers: "list[_Answer]", stamp: Stamp, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
    """Yield the pieces of all prompts' answers as they come."""
    head = stamp.head("text_completion")
    tail: dict[str, Any] = {"usage": None} if include_usage else {}
    queue: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()

    async def collect(answer: _Answer) -> None:
        try:
            async for choice in answer.pieces():
                queue.put_nowait(choice)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(collect(answer)) for answer in answers]
    try:
        num_open = len(answers)
        while num_open:
            piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                num_open -= 1
            else:
                yield head | {"choices": [piece]} | tail
        if include_usage:
            yield head | {"choices": [], "usage": usage_of(_sum(answers))}
    finally:
        for task in tasks:
            task.cancel()
        for answer in answers:
            answer.stream.close()


def _sum(answers: "list[_Answer]") -> Usage:
    usages = [answer.usage for answer in answers]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
    )


@dataclass(kw_only=True)
class _Logprobs:
    """OpenAI's four parallel lists; offsets count the characters of the choice's text."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token: TokenLogprob, offset: int) -> int:
        """Append a token that begins at `offset`; return where the next one does."""
        self.tokens.append(token_name(token))
        self.token_logprobs.append(token.logprob)
        self.top_logprobs.append({token_name(other): other.logprob for other in token.alternatives})
        self.text_offset.append(offset)
        return offset + len(token.text)


class _Answer:
    """One prompt's choices in the making."""

    def __init__(self, body: CompletionRequest, service: ModelService, stream: LiveStream, number: int) -> None:
        self.stream = stream
        self._echo = bool(body.echo)
        prompt = body.prompts[number]
        self._prompt_text = (
            prompt if isinstance(prompt, str) else service.llm.tokenizer.decode(prompt, skip_special=True)
        )
        self._is_prompt_all = body.max_tokens == 0
        self._has_logprobs = body.logprobs is not None
        self._n = body.n or 1
        self._first_index = number * self._n
        self._offsets = [0] * self._n

    @property
    def usage(self) -> Usage:
        """Token counts; the token that nobody asked for is not counted."""
        usage = self.stream.usage
        if not self._is_prompt_all:
            return usage
        return Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=0, cached_tokens=usage.cached_tokens)

    async def choices(self) -> list[dict[str, Any]]:
        """Return the choices, whole."""
        parts: list[list[dict[str, Any]]] = [[] for _ in range(self._n)]
        async for piece in self.pieces():
            parts[piece["index"] - self._first_index].append(piece)
        return [_join(pieces) for pieces in parts]

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """Yield each choice's text in pieces, the prompt first if it is echoed, its reason with the last."""
        is_first = [True] * self._n
        async with self.stream:
            async for chunk in self.stream:
                if is_first[chunk.index] and self._echo:
                    yield self._prompt_piece(chunk.index)
                is_first[chunk.index] = False
                yield self._piece(chunk)

    def _piece(self, chunk: Chunk) -> dict[str, Any]:
        if self._is_prompt_all:
            return self._choice(chunk.index, "", None, "length" if chunk.finish_reason else None)
        logprobs = None
        if self._has_logprobs:
            logprobs, offset = _Logprobs(), self._offsets[chunk.index]
            for token in self.stream.spoken(chunk):
                offset = logprobs.add(token, offset)
            self._offsets[chunk.index] = offset
        return self._choice(chunk.index, chunk.text, logprobs, chunk.finish_reason)

    def _prompt_piece(self, index: int) -> dict[str, Any]:
        logprobs = None
        if self._has_logprobs:
            logprobs, offset = _Logprobs(), 0
            for token in self.stream.prompt_tokens():
                offset = logprobs.add(token, offset)
            logprobs.token_logprobs[0], logprobs.top_logprobs[0] = None, None  # nothing comes before it
            self._offsets[index] = offset
        return self._choice(index, self._prompt_text, logprobs, None)

    def _choice(self, index: int, text: str, logprobs: _Logprobs | None, reason: str | None) -> dict[str, Any]:
        values = None if logprobs is None else vars(logprobs)
        return {"text": text, "index": self._first_index + index, "logprobs": values, "finish_reason": reason}


def _join(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one choice of its pieces."""
    logprobs = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
    joined = {key: [value for part in logprobs for value in part[key]] for key in logprobs[0]} if logprobs else None
    return pieces[-1] | {"text": "".join(piece["text"] for piece in pieces), "logprobs": joined}
