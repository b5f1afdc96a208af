"""Which tokens of which sequences run in the next step.

Owns the queues, and drives a `KVCache`. Knows no model and no arrays of numbers: it turns requests into sequences,
sequences into chunks of tokens, and sampled tokens into finished sequences. Who guesses tokens, and how, it is told.

* First every running sequence that waits for one token gets it, oldest first. When blocks run out the newest running
  sequence is pre-empted: it keeps its tokens, loses its blocks, and is computed again later. The oldest is never
  pre-empted, and admission made sure that it fits alone, so there is always progress.
* What is left of the step's tokens goes to prompts, in chunks. The oldest prompt gets all of it if that finishes it,
  and else at least a half: a short prompt does not wait for a long one, and a long one waits for nobody.
* A sequence reserves the blocks of all its known tokens when it is admitted.
* Guessed tokens may use what blocks are free, but nothing is pre-empted for them. What was computed for guesses that
  did not come true stays in the cache behind the sequence's end, where it is overwritten before anything reads it.
* A prompt that begins like one that is being computed waits for it, and then finds its blocks.
* Sequences 1 to n - 1 of a request wait until sequence 0 has computed the prompt, and then find its full blocks.
"""

from array import array
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from operator import attrgetter, eq

from miniphi.engine.kv_cache import KVCache
from miniphi.engine.request import FinishReason, Request, Sequence
from miniphi.errors import CapacityError, InvalidRequestError

__all__ = ["ScheduledChunk", "ScheduledStep", "Scheduler", "SchedulerLimits"]

_ORDER = attrgetter("arrival", "index")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """What one step may hold."""

    max_batch_tokens: int
    max_logit_rows: int
    max_sequences: int
    """sequences in flight; each may need a token and a row of logits in every step"""
    prefill_chunk: int | None = None
    """most prompt tokens of one sequence in one step; None leaves it to `max_batch_tokens`"""
    original_context: int | None = None
    """tokens up to which LongRoPE's short factors are meant; None if the model has no LongRoPE"""

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run."""
        for name in ("max_batch_tokens", "max_logit_rows", "max_sequences", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledChunk:
    """Tokens `start` to `end - 1` of one sequence."""

    sequence: Sequence
    start: int
    end: int
    prompt_rows: range
    """positions whose logits give the log-probability of the prompt token after them"""
    is_sampled: bool
    """the logits of the last position give a new token"""
    draft: tuple[int, ...] = ()
    """guessed tokens, computed after the known ones: the logits of each position give a new token as well"""

    @property
    def is_decode(self) -> bool:
        """Whether this is the one token that was sampled last."""
        return self.is_sampled and self.end - self.start == 1


@dataclass(kw_only=True, slots=True)
class ScheduledStep:
    """The chunks of one step, and what the limits still allow."""

    num_free_tokens: int
    num_free_rows: int
    chunks: list[ScheduledChunk] = field(default_factory=list)

    def take(self, sequence: Sequence, max_tokens: int) -> int:
        """Add as much of the sequence as fits, and return how many tokens that is."""
        start, known = sequence.num_computed, len(sequence.token_ids)
        first_row = max(start, sequence.next_prompt_logprob - 1)
        last_row = sequence.prompt_len - 1
        end = min(start + min(max_tokens, self.num_free_tokens), known)
        if max(0, min(end, last_row) - first_row) + (end == known) > self.num_free_rows:
            end = min(end, known - 1)
            if first_row < last_row:
                end = min(end, first_row + self.num_free_rows)
        if end <= start:
            return 0
        prompt_rows = range(first_row, max(first_row, min(end, last_row)))
        is_sampled = end == known
        self.num_free_tokens -= end - start
        self.num_free_rows -= len(prompt_rows) + is_sampled
        self.chunks.append(
            ScheduledChunk(sequence=sequence, start=start, end=end, prompt_rows=prompt_rows, is_sampled=is_sampled)
        )
        return end - start


class Scheduler:
    """Continuous batching with chunked prefill and pre-emption by recomputation."""

    def __init__(self, cache: KVCache, limits: SchedulerLimits) -> None:
        self.cache = cache
        self.limits = limits
        self.num_preemptions = 0
        self.num_reused_tokens = 0
        self._max_running = min(limits.max_sequences, limits.max_batch_tokens, limits.max_logit_rows)
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._requests: dict[str, tuple[Sequence, ...]] = {}
        self._num_arrivals = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold nothing yet, or were pre-empted."""
        return len(self._waiting)

    def add(self, request: Request, *, max_tokens: int, stop_token_ids: frozenset[int]) -> tuple[Sequence, ...]:
        """Queue the request's n sequences and return them.

        Raises:
            InvalidRequestError: a request of this id is in flight.
            CapacityError: one of its sequences alone could outgrow the cache.
        """
        if request.id in self._requests:
            raise InvalidRequestError(f"a request with id {request.id!r} is already in flight")
        self.check_capacity(len(request.token_ids), max_tokens)
        prompt_len = len(request.token_ids)
        first_logprob = request.prompt_logprobs_start or prompt_len
        leader: Sequence | None = None
        sequences = []
        for index in range(request.params.n):
            sequence = Sequence(
                request=request,
                index=index,
                arrival=self._num_arrivals,
                max_tokens=max_tokens,
                stop_token_ids=stop_token_ids,
                use_long_factors=self._starts_long(request, max_tokens),
                leader=leader,
                token_ids=array("i", request.token_ids),
                prompt_len=prompt_len,
                next_prompt_logprob=first_logprob if index == 0 else prompt_len,
            )
            leader = leader or sequence
            sequences.append(sequence)
        self._num_arrivals += 1
        self._requests[request.id] = tuple(sequences)
        self._waiting.extend(sequences)
        return tuple(sequences)

    def abort(self, request_id: str, index: int | None = None) -> tuple[Sequence, ...]:
        """End a request, or one of its sequences; return those that ended, none if there is nothing to end."""
        ended = tuple(
            sequence
            for sequence in self._requests.get(request_id, ())
            if not sequence.is_finished and index in (None, sequence.index)
        )
        for sequence in ended:
            self._end(sequence)
        return ended

    def schedule(self, max_prompt_tokens: int | None = None) -> ScheduledStep:
        """Choose the next step's tokens; it holds no chunk only if nothing is in flight.

        Where sequences wait for their next token, prompts get `max_prompt_tokens` of the step at most.
        """
        step = ScheduledStep(num_free_tokens=self.limits.max_batch_tokens, num_free_rows=self.limits.max_logit_rows)
        self._take_decodes(step)
        budget = step.num_free_tokens
        if step.chunks and max_prompt_tokens is not None:
            budget = min(budget, max_prompt_tokens)
        self._take_prompts(step, budget)
        return step

    def _take_prompts(self, step: ScheduledStep, budget: int) -> None:
        prompts = [sequence for sequence in self._running if sequence.num_remaining > 1]
        if not prompts and budget and (admitted := self._admit()):
            prompts = [admitted]
        if not prompts:
            return
        oldest, *others = prompts
        if not others and oldest.num_remaining > budget > 1 and (admitted := self._admit()):
            others = [admitted]
        others.sort(key=attrgetter("num_remaining"))
        wanted = sum(sequence.num_remaining for sequence in others)
        share = budget if oldest.num_remaining <= budget else budget - min(budget // 2, wanted)
        chunk = self.limits.prefill_chunk or self.limits.max_batch_tokens
        for sequence in (oldest, *others):
            budget -= step.take(sequence, min(chunk, share if sequence is oldest else budget))
        while budget > 0 and (admitted := self._admit()):
            budget -= step.take(admitted, min(chunk, budget))

    def draft_room(self, chunk: ScheduledChunk) -> int:
        """Return how many guessed tokens a chunk may be given at most, as far as its sequence is concerned."""
        sequence = chunk.sequence
        if not chunk.is_decode:
            return 0
        room = sequence.max_tokens - sequence.num_generated - 1  # the last token that is sampled is never computed
        border = self.limits.original_context
        if border is not None and sequence.request.rope_policy == "hf" and not sequence.use_long_factors:
            room = min(room, border - chunk.end)  # beyond it the logits would have to be those of the long factors
        num_blocks = len(sequence.block_table) + self.cache.num_available
        return max(0, min(room, num_blocks * self.cache.block_size - chunk.end))

    def add_drafts(self, step: ScheduledStep, drafts: Iterable[tuple[int, ...]]) -> None:
        """Give each chunk of a step its guessed tokens, or as many of them as there is still room for."""
        for index, (chunk, wanted) in enumerate(zip(step.chunks, drafts, strict=True)):
            room = min(self.draft_room(chunk), step.num_free_tokens, step.num_free_rows)
            draft = wanted[:room]
            if not draft:
                continue
            block_table = chunk.sequence.block_table
            missing = self.cache.num_blocks_for(chunk.end + len(draft)) - len(block_table)
            if missing > 0:
                block_table.extend(self.cache.reserve(missing))
            step.num_free_tokens -= len(draft)
            step.num_free_rows -= len(draft)
            step.chunks[index] = replace(chunk, draft=draft)

    def commit(self, chunk: ScheduledChunk, token_ids: Iterable[int]) -> FinishReason | None:
        """Record that a chunk was computed, and the tokens sampled from it; say whether one of them ends the sequence.

        There is one token for each guess that came true and one more, or none if the chunk is not sampled. Those after
        one that ends the sequence are left out.
        """
        sequence = chunk.sequence
        if chunk.prompt_rows:
            sequence.next_prompt_logprob = chunk.prompt_rows.stop + 1
        if chunk.end >= sequence.prompt_len:
            sequence.is_prompt_computed = True
        reason: FinishReason | None = None
        sequence.num_computed = chunk.end
        for number, token_id in enumerate(token_ids):
            sequence.num_computed = chunk.end + number  # all but the newest token, which no step has seen
            sequence.token_ids.append(token_id)
            reason = sequence.finish_reason()
            if reason is not None:
                break
        sequence.num_drafted += len(chunk.draft)
        sequence.num_accepted += sequence.num_computed - chunk.end
        self._share_blocks(sequence, chunk.start)
        if reason is not None:
            self._end(sequence)
        elif self._outgrew_short_factors(sequence):
            self._requeue(sequence)
            sequence.use_long_factors = True
            sequence.block_keys = []
        return reason

    def _take_decodes(self, step: ScheduledStep) -> None:
        # Oldest first, and victims are the newest: a sequence that is already in the step is never pre-empted.
        for sequence in list(self._running):
            if sequence.num_remaining != 1 or not sequence.block_table:
                continue
            if sequence.num_computed == len(sequence.block_table) * self.cache.block_size:
                while sequence.block_table and not self.cache.num_available:
                    self.num_preemptions += 1
                    self._requeue(self._running[-1])
                if not sequence.block_table:
                    break
                sequence.block_table.extend(self.cache.reserve(1))
            step.take(sequence, 1)

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence that may start to the running ones, if it fits."""
        if len(self._running) >= self._max_running:
            return None
        position = next(
            (i for i, each in enumerate(self._waiting) if each.may_start and not self._waits_for_prefix(each)), None
        )
        if position is None:
            return None
        sequence = self._waiting[position]
        matched = self._match(sequence)
        missing = self.cache.num_blocks_for(len(sequence.token_ids)) - len(matched)
        # One spare block for each running sequence, or the newcomer would soon be pre-empted again.
        if missing + len(self._running) > self.cache.num_available:
            self.cache.release(matched)
            return None
        del self._waiting[position]
        insort(self._running, sequence, key=_ORDER)
        sequence.block_table = array("i", matched + self.cache.reserve(missing))
        sequence.num_computed = len(matched) * self.cache.block_size
        self.num_reused_tokens += sequence.num_computed
        if sequence.num_cached_tokens is None:  # a pre-empted sequence finds its own blocks again: no gift
            sequence.num_cached_tokens = sequence.num_computed
        return sequence

    def _match(self, sequence: Sequence) -> list[int]:
        return self.cache.match_prefix(self._reusable_keys(sequence)) if self.cache.allow_reuse else []

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Say whether blocks that the sequence could use are being computed for another prompt."""
        if not self.cache.allow_reuse:
            return False
        keys = self._reusable_keys(sequence)
        for other in self._running:
            if other.num_remaining > 1 and keys and other.block_keys[:1] == keys[:1]:
                num_shared = sum(1 for _ in takewhile(bool, map(eq, keys, other.block_keys)))
                if num_shared * self.cache.block_size > other.num_computed:
                    return True
        return False

    def _reusable_keys(self, sequence: Sequence) -> list[bytes]:
        count = sequence.num_reusable // self.cache.block_size
        self._extend_keys(sequence, count)
        return sequence.block_keys[:count]

    def _share_blocks(self, sequence: Sequence, start: int) -> None:
        """Let others find the blocks that were filled from position `start` on."""
        first, last = start // self.cache.block_size, sequence.num_computed // self.cache.block_size
        if first == last or not self.cache.allow_reuse:
            return
        self._extend_keys(sequence, last)
        for index in range(first, last):
            self.cache.commit(sequence.block_table[index], sequence.block_keys[index])

    def _extend_keys(self, sequence: Sequence, num_blocks: int) -> None:
        self.cache.extend_keys(
            sequence.block_keys,
            sequence.token_ids,
            num_blocks,
            use_long_factors=sequence.use_long_factors,
            salt=sequence.request.cache_salt,
        )

    def _requeue(self, sequence: Sequence) -> None:
        """Send a running sequence back to its place in the queue, without its blocks."""
        self._running.remove(sequence)
        self._drop_blocks(sequence)
        insort(self._waiting, sequence, key=_ORDER)

    def _drop_blocks(self, sequence: Sequence) -> None:
        self.cache.release(sequence.block_table)
        sequence.block_table = array("i")
        sequence.num_computed = 0

    def _end(self, sequence: Sequence) -> None:
        (self._running if sequence.block_table else self._waiting).remove(sequence)
        self._drop_blocks(sequence)
        sequence.is_finished = True
        if all(sibling.is_finished for sibling in self._requests[sequence.request.id]):
            del self._requests[sequence.request.id]

    def _starts_long(self, request: Request, max_tokens: int) -> bool:
        border = self.limits.original_context
        if border is None:
            return False
        prompt_len = len(request.token_ids)
        match request.rope_policy:
            case "auto":
                return prompt_len + max_tokens > border
            case "hf":
                return prompt_len > border
            case policy:
                return policy == "long"

    def _outgrew_short_factors(self, sequence: Sequence) -> bool:
        border = self.limits.original_context
        return (
            border is not None
            and sequence.request.rope_policy == "hf"
            and not sequence.use_long_factors
            and len(sequence.token_ids) > border
        )

    def check_capacity(self, prompt_len: int, max_tokens: int) -> None:
        """Raise CapacityError if such a sequence could outgrow the cache, were it alone."""
        # The last token that is sampled is never computed, so it needs no room.
        needed = self.cache.num_blocks_for(prompt_len + max_tokens - 1)
        if needed > self.cache.num_blocks:
            raise CapacityError(
                f"a prompt of {prompt_len} tokens with max_tokens {max_tokens} may need {needed} cache blocks of "
                f"{self.cache.block_size} tokens and the cache has {self.cache.num_blocks}. Lower max_tokens, shorten "
                "the prompt, or give the cache more memory (--kv-memory)"
            )
