"""One request on its way: token ids come in from the engine, text leaves in chunks.

Owns decoding, stop strings, token counts and timings of a request. Knows neither messages nor how the engine batches.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Self, TypedDict

from miniphi.engine import PromptLogprob, Request, SequenceOutput
from miniphi.engine import TokenLogprob as SampledLogprob
from miniphi.llm.driver import EngineDriver
from miniphi.llm.results import (
    Alternative,
    Choice,
    Chunk,
    Completion,
    FinishReason,
    Timings,
    TokenLogprob,
    Usage,
)
from miniphi.llm.stop import StopMatcher
from miniphi.tokenizer import StreamDecoder, Tokenizer

__all__ = ["CompletionStream", "Generation", "run_to_end"]


class _Spelling(TypedDict):
    text: str
    token_bytes: bytes


class _ChoiceText:
    """One choice in the making: tokens in, chunks out. Tokens whose text is held back wait for it."""

    def __init__(self, index: int, decoder: StreamDecoder, stops: StopMatcher) -> None:
        self.is_finished = False
        self.num_tokens = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self._index = index
        self._decoder = decoder
        self._stops = stops
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def push(self, output: SequenceOutput, logprob: TokenLogprob | None) -> Chunk | None:
        """Take one token; return the text that may leave with it, or None if there is nothing to tell yet."""
        self.num_tokens += 1
        self.num_drafted, self.num_accepted = output.num_drafted, output.num_accepted
        self._token_ids.append(output.token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
        is_stop_token = output.finish_reason == "stop"
        text = "" if is_stop_token else self._stops.push(self._decoder.push(output.token_id))
        reason = output.finish_reason
        if reason is not None:
            text += self._stops.push(self._decoder.flush()) + self._stops.flush()
        if self._stops.matched is not None:
            reason = "stop"
        self.is_finished = reason is not None
        return self._chunk(text, reason) if text or reason is not None else None

    def _chunk(self, text: str, reason: FinishReason | None) -> Chunk:
        token_ids, self._token_ids = self._token_ids, []
        logprobs, self._logprobs = self._logprobs, []
        return Chunk(
            index=self._index,
            text=text,
            token_ids=tuple(token_ids),
            finish_reason=reason,
            logprobs=tuple(logprobs) or None,
        )


class Generation:
    """The state of one request; the engine's driver delivers tokens to it, `take` hands out the chunks."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        params = request.params
        self.request = request
        self.chunks: deque[Chunk] = deque()
        self.error: Exception | None = None
        self._token_bytes = tokenizer.token_bytes
        self._vocab_size = tokenizer.vocab_size
        self._unused_ids = tokenizer.unused_ids
        self._choices = [
            _ChoiceText(
                index,
                tokenizer.stream_decoder(skip_special=True, after=request.token_ids[-1]),
                StopMatcher(params.stop),
            )
            for index in range(params.n)
        ]
        self._num_open = params.n
        self._num_cached = 0
        self.prompt_logprobs: tuple[PromptLogprob, ...] = ()
        """of the prompt from `prompt_logprobs_start` on, with the first token, if the request asked for them"""
        self._started_s = time.perf_counter()
        self._first_s: float | None = None
        self._last_s: float | None = None

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended, or the engine failed."""
        return self._num_open == 0 or self.error is not None

    def has_news(self) -> bool:
        """Whether there is a chunk to take, or no more to come."""
        return bool(self.chunks) or self.is_finished

    def accept(self, output: SequenceOutput, now_s: float) -> bool:
        """Take one token of the engine; True if a stop string ended its choice."""
        if self._first_s is None:
            # Sequence 0 computes the prompt, so the first token is its own.
            self._first_s, self._num_cached = now_s, output.num_cached_tokens
        self._last_s = now_s
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        choice = self._choices[output.index]
        chunk = choice.push(output, self._describe(output))
        if choice.is_finished:
            self._num_open -= 1
        if chunk is not None:
            is_last = self._num_open == 0
            self.chunks.append(replace(chunk, usage=self.usage, timings=self.timings) if is_last else chunk)
        return choice.is_finished

    def fail(self, error: Exception) -> None:
        """End with an error; what was generated before it can still be taken."""
        self.error = error

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            prompt_tokens=len(self.request.token_ids),
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=self._num_cached,
        )

    @property
    def timings(self) -> Timings:
        """Speed so far."""
        if self._first_s is None or self._last_s is None:
            return Timings(
                time_to_first_token_s=None,
                prompt_tokens_per_s=None,
                completion_tokens_per_s=None,
                total_s=0.0,
                drafted_tokens=0,
                accepted_tokens=0,
            )
        to_first_s = self._first_s - self._started_s
        usage = self.usage
        return Timings(
            time_to_first_token_s=to_first_s,
            prompt_tokens_per_s=_rate(usage.prompt_tokens - usage.cached_tokens, to_first_s),
            completion_tokens_per_s=_rate(usage.completion_tokens - 1, self._last_s - self._first_s),
            total_s=self._last_s - self._started_s,
            drafted_tokens=sum(choice.num_drafted for choice in self._choices),
            accepted_tokens=sum(choice.num_accepted for choice in self._choices),
        )

    def prompt_tokens(self) -> Iterator[TokenLogprob]:
        """Yield the prompt's tokens; those that were not scored have a log-probability of 0 and no alternatives."""
        scored = self.prompt_logprobs
        for token_id in self.request.token_ids[: len(self.request.token_ids) - len(scored)]:
            yield TokenLogprob(token_id=token_id, logprob=0.0, **self._spell(token_id))
        for token in scored:
            yield self._spelled(token.token_id, token.logprob, token.top_logprobs)

    def _describe(self, output: SequenceOutput) -> TokenLogprob | None:
        if output.logprob is None:
            return None
        return self._spelled(output.token_id, output.logprob, output.top_logprobs or ())

    def _spelled(self, token_id: int, logprob: float, others: Iterable[SampledLogprob]) -> TokenLogprob:
        alternatives = tuple(
            Alternative(token_id=other.token_id, logprob=other.logprob, **self._spell(other.token_id))
            for other in others
        )
        return TokenLogprob(token_id=token_id, logprob=logprob, alternatives=alternatives, **self._spell(token_id))

    def _spell(self, token_id: int) -> _Spelling:
        # Ids that stand for no text are never sampled, but may be among the alternatives.
        is_text = token_id < self._vocab_size and token_id not in self._unused_ids
        data = self._token_bytes(token_id) if is_text else b""
        return {"text": data.decode("utf-8", errors="replace"), "token_bytes": data}


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


class CompletionStream(Iterator[Chunk]):
    """A running request: iterate over its chunks.

    Leaving it before its end (`close()`, the end of a `with` block, Ctrl-C while waiting, or dropping the last
    reference) ends the request and frees its memory. `usage` and `timings` are up to date at any moment.
    """

    _generation: Generation | None = None

    def __init__(self, driver: EngineDriver, request: Request, tokenizer: Tokenizer, model: str) -> None:
        generation = Generation(request, tokenizer)
        self.model = model
        self._driver = driver
        driver.submit(request, generation)
        self._generation = generation
        self._is_open = True

    @property
    def num_choices(self) -> int:
        """Answers that were asked for."""
        return self._running.request.params.n

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return self._running.usage

    @property
    def timings(self) -> Timings:
        """Speed so far."""
        return self._running.timings

    @property
    def _running(self) -> Generation:
        assert self._generation is not None
        return self._generation

    def __next__(self) -> Chunk:
        generation = self._running
        if not self._is_open:
            raise StopIteration
        if not generation.chunks:
            try:
                # Another thread may close the stream while this one waits.
                self._driver.run_until(lambda: generation.has_news() or not self._is_open)
            except BaseException:
                self.close()
                raise
        if generation.chunks:
            return generation.chunks.popleft()
        self.close()
        if generation.error is not None:
            raise generation.error
        raise StopIteration

    def close(self) -> None:
        """End the request; harmless after its end."""
        if self._generation is not None and self._is_open:
            self._is_open = False
            self._driver.forget(self._generation.request.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def run_to_end(stream: CompletionStream) -> Completion:
    """Take all chunks of a fresh stream and join them."""
    pieces: list[list[Chunk]] = [[] for _ in range(stream.num_choices)]
    for chunk in stream:
        pieces[chunk.index].append(chunk)
    choices = tuple(_join(index, chunks) for index, chunks in enumerate(pieces))
    return Completion(model=stream.model, choices=choices, usage=stream.usage, timings=stream.timings)


def _join(index: int, chunks: list[Chunk]) -> Choice:
    reason = chunks[-1].finish_reason
    assert reason is not None
    logprobs = tuple(token for chunk in chunks for token in chunk.logprobs or ())
    return Choice(
        index=index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        finish_reason=reason,
        logprobs=logprobs or None,
    )
