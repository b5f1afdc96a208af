"""A small model that guesses the next tokens of a large one: a program and a cache of its own, for the same sequences.

A guess is drawn with the noise that the large model's sampler has for the same place, so that the two agree as often as
their distributions let them, at every temperature; whether it comes true is decided as for any other guess
(speculation.py), so no token changes. How often guesses of so much confidence come true is learnt as they are checked.
Where the model's time and the further rows do not promise a gain it rests, and is tried again once in a while.

Owns the draft model's cache and the chances of its guesses. Knows neither scheduling nor the large model.
Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192).
"""

import math
import time
from array import array
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from miniphi.engine.batch import Batch, BatchRunner
from miniphi.engine.kv_cache import KVCache
from miniphi.engine.request import Sequence
from miniphi.engine.sampler import SampleJob, sample
from miniphi.engine.speculation import MAX_DRAFT, MAX_ROWS, MIN_GAIN, StepCosts
from miniphi.kernels import NativeSampler

__all__ = ["DraftModel", "DraftPlan"]

_CONFIDENCES = (0.3, 0.5, 0.7, 0.9, 0.97)
"""Borders between the probabilities that are told apart."""
_FIRST_CHANCES = (0.25, 0.4, 0.55, 0.75, 0.9, 0.97)
"""That a guess comes true, by the probability that the draft model gives it, while nothing was measured."""
_FIRST_HIT_RATE = 0.7
_FIRST_COST = 0.15
"""A step of the draft model, in steps of the large one, before it was measured."""
_LEARNING_RATE = 1 / 16
_COST_RATE = 0.1
_REST = 128
"""Steps after which a model that promised nothing is tried again: to catch up with them takes 1 % of their time."""


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What to guess in a step."""

    length: int
    """tokens for each sequence, 0 for none"""
    least_chance: float = 0.0
    """that a guess and all before it come true, below which it costs more than it promises"""


@dataclass(slots=True, kw_only=True)
class _Follower:
    """One sequence as the draft model knows it."""

    sampler: NativeSampler
    token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    """those whose keys and values are in its cache; the last ones may be guesses that did not come true"""
    num_true: int = 0
    """the first of them that are known to be the sequence's own"""
    use_long_factors: bool = False
    """what they were computed with"""
    block_table: list[int] = field(default_factory=list)
    guesses: list[tuple[int, int]] = field(default_factory=list)
    """class of confidence and token; the last one may have been too unlikely to be computed, but will be checked"""
    first_guess: int = 0
    """its index in the sequence"""


class DraftModel:
    """Guesses for the sequences of an engine."""

    def __init__(self, program: BatchRunner) -> None:
        self.vocab_size = program.config.vocab_size
        self._program = program
        self._has_factor_sets = program.config.rope_scaling is not None
        self._max_tokens = program.config.max_position_embeddings
        self._max_sequences = min(program.max_batch_tokens, program.max_logit_rows)
        self._cache = KVCache(program.num_kv_blocks, allow_reuse=False)
        self._followers: dict[Sequence, _Follower] = {}
        self._chances = list(_FIRST_CHANCES)
        self._hit_rate = _FIRST_HIT_RATE
        self._step_s: float | None = None
        self._num_rested = 0

    def follow(self, sequence: Sequence, sampler: NativeSampler) -> None:
        """Be ready to guess for a sequence; `sampler` draws as that of the large model does, with the same noise."""
        self._followers[sequence] = _Follower(sampler=sampler)

    def forget(self, sequence: Sequence) -> None:
        """Give back what a sequence holds, if it is followed."""
        follower = self._followers.pop(sequence, None)
        if follower is not None:
            self._cache.release(follower.block_table)

    def follows(self, sequence: Sequence) -> bool:
        """Whether it can guess for this sequence."""
        return sequence in self._followers

    def plan(self, num_rows: int, num_sequences: int, costs: StepCosts) -> DraftPlan:
        """Say how many tokens to guess for each of `num_sequences` sequences of a step that has `num_rows` rows."""
        draft_cost = self._relative_cost(costs)
        base = costs.relative(num_rows)
        best_speed, best = MIN_GAIN * num_rows / base, DraftPlan(0)
        chance, expected = 1.0, float(num_rows)
        for length in range(1, min(MAX_DRAFT, (MAX_ROWS - num_rows) // num_sequences) + 1):
            chance *= self._hit_rate
            expected += num_sequences * chance
            rows_cost = costs.relative(num_rows + num_sequences * length)
            speed = expected / (rows_cost + length * draft_cost)
            if speed > best_speed:
                cost_of_guess = (rows_cost - base) / (num_sequences * length) + draft_cost / num_sequences
                best_speed, best = speed, DraftPlan(length, cost_of_guess * speed)
        self._num_rested = 0 if best.length else self._num_rested + 1
        if self._num_rested >= _REST:
            self._num_rested = 0
            return DraftPlan(1)
        return best

    def guess(self, rooms: Mapping[Sequence, int], plan: DraftPlan) -> dict[Sequence, tuple[int, ...]]:
        """Return the guesses for sequences, at most `rooms` of them each; a sequence that finds no room gets none."""
        guesses: dict[Sequence, list[int]] = {}
        active: list[tuple[Sequence, _Follower, float, int]] = []
        for sequence, room in rooms.items():
            follower, length = self._followers[sequence], min(room, plan.length)
            follower.guesses.clear()
            if length > 0 and len(active) < self._max_sequences and self._make_room(sequence, follower, length):
                guesses[sequence] = []
                follower.first_guess = len(sequence.token_ids)
                active.append((sequence, follower, 1.0, length))
        if active:
            self._catch_up([(sequence, follower) for sequence, follower, _, _ in active])
        while active:
            logits = self._run([(s, f, self._next_tokens(s, f, guesses[s])) for s, f, _, _ in active], has_logits=True)
            jobs = [
                SampleJob(sampler=f.sampler, row=row, position=s.num_generated + len(guesses[s]))
                for row, (s, f, _, _) in enumerate(active)
            ]
            going_on = []
            for (sequence, follower, chance, length), (drawn,) in zip(active, sample(logits, jobs), strict=True):
                assert drawn.logprob is not None, "the draft's sampler does not report its confidence"
                index = bisect(_CONFIDENCES, math.exp(drawn.logprob))
                chance *= self._chances[index]  # noqa: PLW2901
                follower.guesses.append((index, drawn.token_id))
                if chance < plan.least_chance:
                    continue
                guesses[sequence].append(drawn.token_id)
                if len(guesses[sequence]) < length:
                    going_on.append((sequence, follower, chance, length))
            active = going_on
        return {sequence: tuple(tokens) for sequence, tokens in guesses.items() if tokens}

    def learn(self, sequence: Sequence) -> None:
        """Compare the last guesses with the tokens that came."""
        follower = self._followers[sequence]
        for (index, guess), token in zip(follower.guesses, sequence.token_ids[follower.first_guess :], strict=False):
            is_true = guess == token
            self._chances[index] += (is_true - self._chances[index]) * _LEARNING_RATE
            self._hit_rate += (is_true - self._hit_rate) * _LEARNING_RATE
            if not is_true:
                break
        follower.guesses.clear()

    def _relative_cost(self, costs: StepCosts) -> float:
        if self._step_s is None or costs.step_s is None:
            return _FIRST_COST
        return self._step_s / costs.step_s

    def _make_room(self, sequence: Sequence, follower: _Follower, length: int) -> bool:
        """Reserve blocks for a sequence's known tokens and guesses; forget guesses that did not come true."""
        known, seen = sequence.token_ids, follower.token_ids
        end = len(known) + length - 1  # the last guess is not computed
        missing = self._cache.num_blocks_for(end) - len(follower.block_table)
        if end > self._max_tokens or missing > self._cache.num_available:
            return False
        if missing > 0:
            follower.block_table += self._cache.reserve(missing)
        if follower.use_long_factors != sequence.use_long_factors:
            follower.use_long_factors, follower.num_true = sequence.use_long_factors, 0
            del seen[:]
        last = min(len(seen), len(known) - 1)  # the newest token is computed anyway: its logits are needed
        while follower.num_true < last and seen[follower.num_true] == known[follower.num_true]:
            follower.num_true += 1
        del seen[follower.num_true :]
        return True

    def _catch_up(self, sequences: list[tuple[Sequence, _Follower]]) -> None:
        """Compute what does not fit into the step that gives the first guesses, one sequence after the other."""
        share = max(1, self._program.max_batch_tokens // len(sequences))
        for sequence, follower in sequences:
            while (missing := len(sequence.token_ids) - len(follower.token_ids)) > share:
                start = len(follower.token_ids)
                piece = sequence.token_ids[start : start + min(missing - 1, self._program.max_batch_tokens)]
                self._run([(sequence, follower, piece)], has_logits=False)

    @staticmethod
    def _next_tokens(sequence: Sequence, follower: _Follower, guesses: list[int]) -> "array[int]":
        """Return the known tokens that were not computed yet, then the newest guess."""
        return array("i", guesses[-1:]) if guesses else sequence.token_ids[len(follower.token_ids) :]

    def _run(self, feeds: "list[tuple[Sequence, _Follower, array[int]]]", *, has_logits: bool) -> NDArray[np.float32]:
        """Compute tokens after those that each follower knows; return the logits of the last one of each."""
        counts = [len(tokens) for _, _, tokens in feeds]
        query_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        ends = [len(follower.token_ids) + count for (_, follower, _), count in zip(feeds, counts, strict=True)]
        block_tables = np.zeros((len(feeds), max(len(follower.block_table) for _, follower, _ in feeds)), np.int32)
        for row, (_, follower, _) in enumerate(feeds):
            block_tables[row, : len(follower.block_table)] = follower.block_table
        batch = Batch(
            token_ids=np.concatenate([np.array(tokens, np.int32) for _, _, tokens in feeds]),
            positions=np.concatenate(
                [np.arange(end - count, end, dtype=np.int32) for end, count in zip(ends, counts, strict=True)]
            ),
            query_starts=query_starts,
            context_lens=np.array(ends, np.int32),
            block_tables=block_tables,
            use_long_factors=np.array([self._has_factor_sets and s.use_long_factors for s, _, _ in feeds], np.bool_),
            logit_rows=query_starts[1:] - 1 if has_logits else np.zeros(0, np.int32),
        )
        start_s = time.perf_counter()
        logits = self._program.run(batch)
        if max(counts) == 1:
            seconds = time.perf_counter() - start_s
            self._step_s = seconds if self._step_s is None else self._step_s + (seconds - self._step_s) * _COST_RATE
        for _, follower, tokens in feeds:
            follower.token_ids += tokens
        return logits
