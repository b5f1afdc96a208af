"""Token ids in, token ids out: one program, one scheduler, one cache, a sampler per sequence, perhaps a draft model.

Owns the life of a request from `submit` to its last `SequenceOutput`. Knows no text: stop strings, detokenisation and
filters belong to the layer above, which calls `abort` when it has enough. All methods must be called from one thread.
"""

import time
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miniphi.engine.batch import Batch, BatchRunner
from miniphi.engine.drafting import DraftModel
from miniphi.engine.kv_cache import KVCache
from miniphi.engine.pace import PromptPace
from miniphi.engine.request import PromptLogprob, Request, Sequence, SequenceOutput
from miniphi.engine.sampler import (
    SampledToken,
    SampleJob,
    fresh_seed,
    make_sampler,
    prompt_logprobs,
    sample,
    without_history,
)
from miniphi.engine.sampling_params import SamplingParams
from miniphi.engine.scheduler import ScheduledChunk, ScheduledStep, Scheduler, SchedulerLimits
from miniphi.engine.speculation import MAX_ROWS, PromptLookup, StepCosts, index_ngrams, plan_drafts
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
    max_step_s: float | None = None
    """while sequences wait for their next token, prompts get so much of a step that it takes about this long; None
    gives them all that fits, which is a little less work in all"""
    allow_prefix_reuse: bool = True
    draft_row_cost: float | None = None
    """what one more row of a step costs, as a share of a step of one, for requests that speculate; None measures it"""


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
    num_drafted_tokens: int
    """tokens that were guessed ahead and computed"""
    num_accepted_tokens: int
    """guessed tokens that came true"""


class Engine:
    """Runs many requests together, one step at a time."""

    def __init__(
        self,
        program: BatchRunner,
        *,
        draft: BatchRunner | None = None,
        stop_token_ids: Iterable[int] = (),
        unused_token_ids: Iterable[int] = (),
        options: EngineOptions | None = None,
    ) -> None:
        """Run a program; `draft` is a smaller one with the same vocabulary, to guess tokens ahead with.

        Raises InvalidRequestError: an option or a token id does not fit the model, or the draft's vocabulary differs.
        """
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
        self._draft_model = None if draft is None else DraftModel(draft)
        if self._draft_model is not None and self._draft_model.vocab_size != self._vocab_size:
            raise InvalidRequestError(
                f"the draft model knows {self._draft_model.vocab_size} token ids and the model {self._vocab_size}"
            )
        self._cache = KVCache(program.num_kv_blocks, allow_reuse=options.allow_prefix_reuse)
        self._scheduler = Scheduler(self._cache, limits)
        self._samplers: dict[Sequence, NativeSampler] = {}
        self._lookups: dict[Sequence, PromptLookup] = {}
        self._step_costs = StepCosts(options.draft_row_cost)
        self._prompt_pace = PromptPace(options.max_step_s)
        self._prompt_logprobs: dict[Sequence, list[PromptLogprob]] = {}
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_drafted_tokens = 0
        self._num_accepted_tokens = 0
        self.failed_request_ids: tuple[str, ...] = ()
        """requests that ended because the last `step` raised"""

    @property
    def has_work(self) -> bool:
        """Whether a sequence is running or waiting."""
        return bool(self._samplers)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The model's own stop ids, which end an answer unless `ignore_eos`."""
        return self._stop_ids

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
            num_drafted_tokens=self._num_drafted_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
        )

    def check(self, request: Request) -> int:
        """Return how many tokens the request may generate. Depends on nothing that changes; safe from any thread.

        Raises: what `submit` does, but for an id that is in flight.
        """
        request.check_vocabulary(self._vocab_size)
        max_tokens = request.resolve_max_tokens(self.max_context, self._original_context)
        self._scheduler.check_capacity(len(request.token_ids), max_tokens)
        return max_tokens

    def submit(self, request: Request) -> str:
        """Queue a request and return its id.

        Raises:
            ContextLengthError: prompt and answer do not fit the context.
            CapacityError: they can never fit the cache.
            InvalidRequestError: a token id is outside the vocabulary, or the request's id is in flight.
        """
        params = request.params
        max_tokens = self.check(request)
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._stop_ids)
        sequences = self._scheduler.add(request, max_tokens=max_tokens, stop_token_ids=stop_ids)
        seed = fresh_seed() if params.seed is None else params.seed
        for sequence in sequences:
            self._samplers[sequence] = self._make_sampler(params, sequence, seed)
            if self._draft_model is not None and params.speculate == "auto":
                self._draft_model.follow(sequence, self._make_sampler(without_history(params), sequence, seed))
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
        step = self._scheduler.schedule(self._prompt_pace.max_tokens)
        if not step.chunks:
            return []
        is_decode = all(chunk.is_decode for chunk in step.chunks)
        try:
            if is_decode and (self._lookups or self._draft_model is not None):
                self._add_drafts(step)
            start_s = time.perf_counter()
            logits = self._program.run(build_batch(step))
            samples = self._sample(step, logits)
            seconds = time.perf_counter() - start_s
            if is_decode:
                self._step_costs.record(len(logits), seconds)
            else:
                self._prompt_pace.record(sum(chunk.end - chunk.start for chunk in step.chunks), seconds)
        except BaseException:  # an interrupt, too, must leave no half-computed sequence behind
            self._fail(step)
            raise
        return [
            output
            for chunk, sampled in zip(step.chunks, samples, strict=True)
            for output in self._commit(chunk, sampled)
        ]

    def _add_drafts(self, step: ScheduledStep) -> None:
        lookups = [self._lookups.get(chunk.sequence) for chunk in step.chunks]
        rooms = [self._scheduler.draft_room(chunk) for chunk in step.chunks]
        lengths = plan_drafts(lookups, rooms, self._step_costs)
        drafts = [
            lookup.draft(length) if lookup and length else () for lookup, length in zip(lookups, lengths, strict=True)
        ]
        if self._draft_model is not None:
            rooms_without_draft = {
                chunk.sequence: room
                for chunk, room, draft in zip(step.chunks, rooms, drafts, strict=True)
                if room and not draft and self._draft_model.follows(chunk.sequence)
            }
            guesses = self._guess(self._draft_model, rooms_without_draft, len(drafts) + sum(lengths))
            drafts = [
                draft or guesses.get(chunk.sequence, ()) for chunk, draft in zip(step.chunks, drafts, strict=True)
            ]
        if any(drafts):
            self._scheduler.add_drafts(step, drafts)

    def _guess(
        self, model: DraftModel, rooms: Mapping[Sequence, int], num_rows: int
    ) -> Mapping[Sequence, tuple[int, ...]]:
        if not rooms or num_rows + len(rooms) > MAX_ROWS:
            return {}
        plan = model.plan(num_rows, len(rooms), self._step_costs)
        return model.guess(rooms, plan) if plan.length else {}

    def _sample(self, step: ScheduledStep, logits: NDArray[np.float32]) -> list[list[SampledToken]]:
        jobs: list[SampleJob] = []
        row = 0
        for chunk in step.chunks:
            sequence, scored = chunk.sequence, chunk.prompt_rows
            if scored:
                targets = sequence.token_ids[scored.start + 1 : scored.stop + 1]
                wanted = sequence.request.params.logprobs or 0
                self._prompt_logprobs[sequence] += prompt_logprobs(logits[row : row + len(scored)], targets, wanted)
                row += len(scored)
            if chunk.is_sampled:
                sampler, position = self._samplers[sequence], sequence.num_generated
                jobs.append(SampleJob(sampler=sampler, row=row, position=position, draft=chunk.draft))
                row += 1 + len(chunk.draft)
        drawn = iter(sample(logits, jobs))
        return [next(drawn) if chunk.is_sampled else [] for chunk in step.chunks]

    def _commit(self, chunk: ScheduledChunk, sampled: list[SampledToken]) -> list[SequenceOutput]:
        sequence = chunk.sequence
        num_before, num_accepted_before = sequence.num_generated, sequence.num_accepted
        finish_reason = self._scheduler.commit(chunk, [token.token_id for token in sampled])
        taken = sampled[: sequence.num_generated - num_before]
        if not taken:
            return []
        self._num_generated_tokens += len(taken)
        self._num_drafted_tokens += len(chunk.draft)
        self._num_accepted_tokens += sequence.num_accepted - num_accepted_before
        if num_before == 0 and sequence.index == 0:
            self._num_prompt_tokens += sequence.prompt_len
        scores = self._prompt_logprobs.pop(sequence, None)
        assert sequence.num_cached_tokens is not None, "a sequence generated before it was admitted"
        if finish_reason is not None:
            self._forget(sequence)
        elif sequence.request.params.speculate != "off":
            self._look_up(sequence)
            if self._draft_model is not None and self._draft_model.follows(sequence):
                self._draft_model.learn(sequence)
        return [
            SequenceOutput(
                request_id=sequence.request.id,
                index=sequence.index,
                token_id=token.token_id,
                logprob=token.logprob,
                top_logprobs=token.top_logprobs,
                finish_reason=finish_reason if token is taken[-1] else None,
                prompt_logprobs=tuple(scores) if scores is not None and token is taken[0] else None,
                num_cached_tokens=sequence.num_cached_tokens,
                num_drafted=sequence.num_drafted,
                num_accepted=sequence.num_accepted,
            )
            for token in taken
        ]

    def _look_up(self, sequence: Sequence) -> None:
        lookup = self._lookups.get(sequence)
        if lookup is None:
            shared = self._lookups.get(sequence.leader) if sequence.leader else None
            prompt_index = shared.prompt_index if shared else index_ngrams(sequence.request.token_ids)
            lookup = self._lookups[sequence] = PromptLookup(sequence.token_ids, prompt_index, sequence.prompt_len)
        lookup.advance()

    def _fail(self, step: ScheduledStep) -> None:
        self.failed_request_ids = tuple(dict.fromkeys(chunk.sequence.request.id for chunk in step.chunks))
        for request_id in self.failed_request_ids:
            self.abort(request_id)

    def _forget(self, sequence: Sequence) -> None:
        del self._samplers[sequence]
        self._lookups.pop(sequence, None)
        self._prompt_logprobs.pop(sequence, None)
        if self._draft_model is not None:
            self._draft_model.forget(sequence)

    def _make_sampler(self, params: SamplingParams, sequence: Sequence, seed: int) -> NativeSampler:
        return make_sampler(
            params,
            vocab_size=self._vocab_size,
            prompt_ids=sequence.request.token_ids,
            unused_ids=self._unused_ids,
            stop_ids=sequence.stop_token_ids,
            seed=seed,
            choice=sequence.index,
        )

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
        token_ids.extend(chunk.draft)
        positions.extend(range(start, end + len(chunk.draft)))
        query_starts.append(len(token_ids))
        block_tables[index, : len(sequence.block_table)] = sequence.block_table
        rows.extend(position + offset for position in chunk.prompt_rows)
        if chunk.is_sampled:
            rows.extend(range(end - 1 + offset, end + len(chunk.draft) + offset))
    return Batch(
        token_ids=np.array(token_ids, np.int32),
        positions=np.array(positions, np.int32),
        query_starts=np.array(query_starts, np.int32),
        context_lens=np.array([chunk.end + len(chunk.draft) for chunk in chunks], np.int32),
        block_tables=block_tables,
        use_long_factors=np.array([chunk.sequence.use_long_factors for chunk in chunks], np.bool_),
        logit_rows=np.array(rows, np.int32),
    )
