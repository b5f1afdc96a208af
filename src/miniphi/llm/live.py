"""Requests for an event loop: posted without waiting, computed in a thread of their own, read as they grow.

Knows asyncio and nothing of HTTP. A step of the engine runs native code without the interpreter's lock, so the loop
goes on meanwhile.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Self

from miniphi.engine import Request, SequenceOutput
from miniphi.llm.driver import EngineDriver
from miniphi.llm.generation import Generation
from miniphi.llm.results import Chunk, FinishReason, Timings, TokenLogprob, Usage
from miniphi.tokenizer import Tokenizer

__all__ = ["EngineThread", "LiveStream"]


class EngineThread:
    """Runs an engine's steps while anybody waits for one, and sleeps otherwise. Belongs to one event loop."""

    def __init__(self, driver: EngineDriver, tokenizer: Tokenizer) -> None:
        self._driver = driver
        self._tokenizer = tokenizer
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._wake = threading.Event()
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[LiveStream] = set()
        self._changed: deque[LiveStream] = deque()
        self._is_call_due = False
        self.on_end: Callable[[LiveStream], None] | None = None
        """told of every stream when it is closed"""
        self.error: Exception | None = None
        """what ended the thread; nothing can be computed after it"""

    def start(self) -> None:
        """Begin, on behalf of the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread, after the step that is running; streams that are still open are closed."""
        for stream in tuple(self._open):
            stream.close()
        self._is_stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    @property
    def num_open(self) -> int:
        """Streams that were opened and have not ended."""
        return len(self._open)

    def open(self, request: Request) -> "LiveStream":
        """Post a request; to be called in the event loop.

        Raises: what `Engine.check` does, and whatever ended the thread.
        """
        if self.error is not None:
            raise self.error
        self._driver.engine.check(request)
        params, engine = request.params, self._driver.engine
        own = frozenset() if params.ignore_eos else engine.stop_token_ids
        stream = LiveStream(self, request, self._tokenizer, own | frozenset(params.stop_token_ids))
        self._open.add(stream)
        self._driver.post(request, stream)
        self._wake.set()
        return stream

    def fail_all(self, error: Exception) -> None:
        """End every open stream with an error, which its reader raises."""
        for stream in tuple(self._open):
            stream.fail(error)

    def forget(self, stream: "LiveStream") -> None:
        """Let go of a stream, and end its request if it is still running."""
        self._open.discard(stream)
        if self.on_end is not None:
            self.on_end(stream)
        self._driver.forget(stream.request.id)
        self._wake.set()

    def tell(self, stream: "LiveStream") -> None:
        """Wake a stream's reader; the engine's thread calls it, often many times a step, and the loop is told once."""
        self._changed.append(stream)
        if not self._is_call_due:
            self._is_call_due = True
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._wake_readers)

    def _wake_readers(self) -> None:
        self._is_call_due = False
        while self._changed:
            self._changed.popleft().news.set()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._wake.clear()
                while self._driver.run_pending() and not self._is_stopping:
                    pass
                self._wake.wait()
        except Exception as error:
            self.error = error
            self.fail_all(error)


class LiveStream(AsyncIterator[Chunk]):
    """A running request: iterate over its chunks with `async for`, and close it in any case."""

    def __init__(self, thread: EngineThread, request: Request, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        self.request = request
        self._stop_ids = stop_ids
        self.news = asyncio.Event()
        self._thread = thread
        self.finish_reasons: list[FinishReason] = []
        """of the choices that have ended, as far as their chunks were read"""
        self._generation = Generation(request, tokenizer)
        self._is_open = True

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return self._generation.usage

    @property
    def timings(self) -> Timings:
        """Speed so far."""
        return self._generation.timings

    def spoken(self, chunk: Chunk) -> list[TokenLogprob]:
        """Return the log-probabilities of a chunk's tokens, but for a stop token, which is no part of the answer."""
        tokens = list(chunk.logprobs or ())
        if chunk.finish_reason == "stop" and tokens and tokens[-1].token_id in self._stop_ids:
            tokens.pop()
        return tokens

    def prompt_tokens(self) -> Iterator[TokenLogprob]:
        """Yield the prompt's tokens, scored if the request asked for it; complete once the first chunk has come."""
        return self._generation.prompt_tokens()

    def accept(self, output: SequenceOutput, now_s: float) -> bool:
        """See OutputSink; in the engine's thread."""
        must_end = self._generation.accept(output, now_s)
        if self._generation.has_news():
            self._thread.tell(self)
        return must_end

    def fail(self, error: Exception) -> None:
        """See OutputSink; in the engine's thread."""
        self._generation.fail(error)
        self._thread.tell(self)

    async def __anext__(self) -> Chunk:
        """Return the next chunk. Raises what the engine failed with."""
        generation = self._generation
        while self._is_open:
            if generation.chunks:
                chunk = generation.chunks.popleft()
                if chunk.finish_reason is not None:
                    self.finish_reasons.append(chunk.finish_reason)
                return chunk
            if generation.is_finished:
                self.close()
                if generation.error is not None:
                    raise generation.error
                break
            self.news.clear()
            if not generation.has_news():
                await self.news.wait()
        raise StopAsyncIteration

    def close(self) -> None:
        """End the request, wherever it is; harmless after its end."""
        if self._is_open:
            self._is_open = False
            self.news.set()
            self._thread.forget(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        self.close()
