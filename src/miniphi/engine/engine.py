"""Token ids in, token ids out: one program, one scheduler, one cache, and a sampler for each sequence.

Owns the life of a request from `submit` to its last `SequenceOutput`. Knows no text: stop strings, detokenisation and
filters belong to the layer above, which calls `abort` when it has enough. All methods must be called from one thread.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miniphi.engine.batch import Batch, BatchRunner
from miniphi.engine.kv_cache import KVCache
from miniphi.engine.request import PromptLogprob, Request, Sequence, SequenceOutput
from miniphi.engine.sampler import SampledToken, SampleJob, fresh_seed, make_sampler, prompt_logprobs, sample
from miniphi.engine.scheduler import ScheduledChunk, ScheduledStep, Scheduler, SchedulerLimits
from miniphi.errors import InvalidRequestError
from miniphi.kernels import NativeSampler

__all__ = ["Engine", "EngineOptions", "EngineStats", "build_batch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How an engine uses its program."""

    max_context: int | None = None
    """tokens of prompt and answer together; None is the model's `max_position_embeddings`"""
    max_sequences: int = 64
    """sequences in flight; further ones wait"""
    prefill_chunk: int | None = None
    """most prompt tokens of one sequence in one step; None leaves it to the program's `max_batch_tokens`"""
    allow_prefix_reuse: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What is going on, and totals since the engine was made."""

    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_blocks_free: int
    num_blocks_cached: int
    num_prompt_tokens: int
    """prompts that were computed or found; counted once for all n sequences of a request"""
    num_generated_tokens: int
    num_reused_tokens: int
    """tokens found in the prefix cache instead of computed"""
    num_preemptions: int


class Engine:
    """Runs many requests together, one step at a time."""

    def __init__(
        self,
        program: BatchRunner,
        *,
        stop_token_ids: Iterable[int] = (),
        unused_token_ids: Iterable[int] = (),
        options: EngineOptions | None = None,
    ) -> None:
        options = options or EngineOptions()
        config = program.config
        self._program = program
        self._vocab_size = config.vocab_size
        self._stop_ids = self._checked_ids("stop_token_ids", stop_token_ids)
        self._unused_ids = self._checked_ids("unused_token_ids", unused_token_ids)
        self.max_context = options.max_context or config.max_position_embeddings
        if not 0 < self.max_context <= config.max_position_embeddings:
            raise InvalidRequestError(
                f"max_context is {self.max_context}; the model's positions allow 1 to {config.max_position_embeddings}"
            )
        scaling = config.rope_scaling
        self._original_context = None if scaling is None else scaling.original_max_position_embeddings
        limits = SchedulerLimits(
            max_batch_tokens=program.max_batch_tokens,
            max_logit_rows=program.max_logit_rows,
            max_sequences=options.max_sequences,
            prefill_chunk=options.prefill_chunk,
            original_context=config.rope_scaling.original_max_position_embeddings if config.rope_scaling else None,
        )
        self._cache = KVCache(program.num_kv_blocks, allow_reuse=options.allow_prefix_reuse)
        self._scheduler = Scheduler(self._cache, limits)
        self._samplers: dict[Sequence, NativeSampler] = {}
        self._prompt_logprobs: dict[Sequence, list[PromptLogprob]] = {}
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self.failed_request_ids: tuple[str, ...] = ()
        """requests that ended because the last `step` raised"""

    @property
    def has_work(self) -> bool:
        """Whether a sequence is running or waiting."""
        return bool(self._samplers)

    @property
    def stats(self) -> EngineStats:
        """A snapshot."""
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_blocks_used=self._cache.num_used,
            num_blocks_free=self._cache.num_free,
            num_blocks_cached=self._cache.num_cached,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_reused_tokens=self._scheduler.num_reused_tokens,
            num_preemptions=self._scheduler.num_preemptions,
        )

    def submit(self, request: Request) -> str:
        """Queue a request and return its id.

        Raises:
            ContextLengthError: prompt and answer do not fit the context.
            CapacityError: they can never fit the cache.
            InvalidRequestError: a token id is outside the vocabulary, or the request's id is in flight.
        """
        params = request.params
        request.check_vocabulary(self._vocab_size)
        max_tokens = request.resolve_max_tokens(self.max_context, self._original_context)
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._stop_ids)
        sequences = self._scheduler.add(request, max_tokens=max_tokens, stop_token_ids=stop_ids)
        seed = fresh_seed() if params.seed is None else params.seed
        for sequence in sequences:
            self._samplers[sequence] = make_sampler(
                params,
                vocab_size=self._vocab_size,
                prompt_ids=request.token_ids,
                unused_ids=self._unused_ids,
                stop_ids=stop_ids,
                seed=seed,
                choice=sequence.index,
            )
        if request.prompt_logprobs_start is not None:
            self._prompt_logprobs[sequences[0]] = []
        return request.id

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """End a request, or one of its n sequences, without further output; say whether there was anything to end."""
        ended = self._scheduler.abort(request_id, index)
        for sequence in ended:
            self._forget(sequence)
        return bool(ended)

    def step(self) -> list[SequenceOutput]:
        """Run one step and return the tokens it generated; the list is empty while prompts are computed.

        If it raises, every request of the step has ended and is named in `failed_request_ids`; the others go on.

        Raises:
            MiniphiError: the model returned logits that are not finite.
        """
        self.failed_request_ids = ()
        step = self._scheduler.schedule()
        if not step.chunks:
            return []
        try:
            logits = self._program.run(build_batch(step))
            samples = self._sample(step, logits)
        except BaseException:  # an interrupt, too, must leave no half-computed sequence behind
            self._fail(step)
            raise
        return [
            output
            for chunk, sampled in zip(step.chunks, samples, strict=True)
            if (output := self._commit(chunk, sampled)) is not None
        ]

    def _sample(self, step: ScheduledStep, logits: NDArray[np.float32]) -> list[SampledToken | None]:
        jobs: list[SampleJob] = []
        row = 0
        for chunk in step.chunks:
            sequence, scored = chunk.sequence, chunk.prompt_rows
            if scored:
                targets = sequence.token_ids[scored.start + 1 : scored.stop + 1]
                self._prompt_logprobs[sequence] += prompt_logprobs(logits[row : row + len(scored)], targets)
                row += len(scored)
            if chunk.is_sampled:
                jobs.append(SampleJob(sampler=self._samplers[sequence], row=row, position=sequence.num_generated))
                row += 1
        drawn = iter(sample(logits, jobs))
        return [next(drawn)[0] if chunk.is_sampled else None for chunk in step.chunks]

    def _commit(self, chunk: ScheduledChunk, sampled: SampledToken | None) -> SequenceOutput | None:
        sequence = chunk.sequence
        if sampled is None:
            self._scheduler.commit(chunk, None)
            return None
        finish_reason = self._scheduler.commit(chunk, sampled.token_id)
        self._num_generated_tokens += 1
        if sequence.num_generated == 1 and sequence.index == 0:
            self._num_prompt_tokens += sequence.prompt_len
        scores = self._prompt_logprobs.pop(sequence, None)
        assert sequence.num_cached_tokens is not None, "a sequence generated before it was admitted"
        if finish_reason is not None:
            self._forget(sequence)
        return SequenceOutput(
            request_id=sequence.request.id,
            index=sequence.index,
            token_id=sampled.token_id,
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
            finish_reason=finish_reason,
            prompt_logprobs=None if scores is None else tuple(scores),
            num_cached_tokens=sequence.num_cached_tokens,
        )

    def _fail(self, step: ScheduledStep) -> None:
        self.failed_request_ids = tuple(dict.fromkeys(chunk.sequence.request.id for chunk in step.chunks))
        for request_id in self.failed_request_ids:
            self.abort(request_id)

    def _forget(self, sequence: Sequence) -> None:
        del self._samplers[sequence]
        self._prompt_logprobs.pop(sequence, None)

    def _checked_ids(self, name: str, token_ids: Iterable[int]) -> frozenset[int]:
        ids = frozenset(token_ids)
        outside = sorted(token_id for token_id in ids if not 0 <= token_id < self._vocab_size)
        if outside:
            raise InvalidRequestError(f"{name} holds {outside[0]}; the model's ids go from 0 to {self._vocab_size - 1}")
        return ids


def build_batch(step: ScheduledStep) -> Batch:
    """Pack a step's chunks into the arrays that a program runs."""
    chunks = step.chunks
    token_ids, positions, rows = array("i"), array("i"), array("i")
    query_starts = array("i", [0])
    width = max(len(chunk.sequence.block_table) for chunk in chunks)
    block_tables = np.zeros((len(chunks), width), np.int32)
    for index, chunk in enumerate(chunks):
        sequence, start, end = chunk.sequence, chunk.start, chunk.end
        offset = len(token_ids) - start
        token_ids += sequence.token_ids[start:end]
        positions.extend(range(start, end))
        query_starts.append(len(token_ids))
        block_tables[index, : len(sequence.block_table)] = sequence.block_table
        rows.extend(position + offset for position in chunk.prompt_rows)
        if chunk.is_sampled:
            rows.append(end - 1 + offset)
    return Batch(
        token_ids=np.array(token_ids, np.int32),
        positions=np.array(positions, np.int32),
        query_starts=np.array(query_starts, np.int32),
        context_lens=np.array([chunk.end for chunk in chunks], np.int32),
        block_tables=block_tables,
        use_long_factors=np.array([chunk.sequence.use_long_factors for chunk in chunks], np.bool_),
        logit_rows=np.array(rows, np.int32),
    )
