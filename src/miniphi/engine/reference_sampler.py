"""From logits to a token in NumPy: penalties, filters, the draw, and log-probabilities.

What the tests compare csrc/sampler.cpp with; the engine does not use it.

Log-probabilities are those of the model itself: the log-softmax of the logits as they come, before masks, biases,
penalties, temperature and filters. Sums run in float64.

Shapes: V is the vocabulary size.
"""

import math
import struct
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from miniphi.engine.request import PromptLogprob, TokenLogprob
from miniphi.engine.sampler import SampledToken
from miniphi.engine.sampling_params import SamplingParams
from miniphi.errors import MiniphiError

__all__ = ["ReferenceSampler", "draw", "prompt_logprob", "uniform"]

_FIRST_CANDIDATES = 64
"""Tokens ranked at first when no top_k bounds them; nearly every draw ends among them."""
_CANDIDATE_GROWTH = 8
_MIN_GROUPS = 256
"""Groups in which `_rank` looks for the largest scores; the width of the vector maximum it takes over them."""
_MIN_TEMPERATURE = 1e-30
"""Dividing by less overflows float32; the result is the same, as every logit but the largest already weighs 0."""


class ReferenceSampler:
    """Draws the tokens of one sequence."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        prompt_ids: tuple[int, ...],
        unused_ids: frozenset[int] = frozenset(),
        stop_ids: frozenset[int] = frozenset(),
        seed: int = 0,
        choice: int = 0,
    ) -> None:
        self._params = params
        self._seed = seed
        self._choice = choice
        self._masked = np.array(sorted(unused_ids), np.intp)
        self._masked_early = np.array(sorted(unused_ids | stop_ids), np.intp)
        self._bias_ids = np.array(list(params.logit_bias), np.intp)
        self._biases = np.array(list(params.logit_bias.values()), np.float32)
        self._is_seen: NDArray[np.bool_] | None = None
        self._counts: NDArray[np.float32] | None = None
        if params.repetition_penalty != 1:
            self._is_seen = np.zeros(vocab_size, np.bool_)
            self._is_seen[list(prompt_ids)] = True
        if params.presence_penalty or params.frequency_penalty:
            self._counts = np.zeros(vocab_size, np.float32)

    def sample(self, logits: NDArray[np.float32], position: int) -> SampledToken:
        """Choose the next token from logits [V], which are overwritten, and count it for the penalties.

        The order is: mask unused ids, and stop ids before `min_tokens`; add `logit_bias`; divide or multiply by the
        repetition penalty; subtract presence and frequency penalties; divide by the temperature; keep the `top_k` most
        likely; keep the fewest that reach `top_p`; drop those below `min_p` of the most likely; draw.

        `position` is the number of tokens generated so far.

        Raises:
            MiniphiError: a logit is not finite, or everything is masked.
        """
        _check_finite(logits)
        params = self._params
        scores = logits if params.logprobs is None else logits.copy()
        self._edit(scores, position)
        if params.temperature == 0:
            token_id = int(scores.argmax())
            if scores[token_id] == -math.inf:
                raise _nothing_left()
        else:
            token_id = draw(scores, params, uniform(self._seed, self._choice, position))
        self.observe(token_id)
        if params.logprobs is None:
            return SampledToken(token_id=token_id, logprob=None, top_logprobs=None)
        log_total = _log_sum_exp(logits)
        best = _rank(logits, params.logprobs) if params.logprobs else ()
        return SampledToken(
            token_id=token_id,
            logprob=float(logits[token_id]) - log_total,
            top_logprobs=tuple(TokenLogprob(token_id=int(i), logprob=float(logits[i]) - log_total) for i in best),
        )

    def observe(self, token_id: int) -> None:
        """Count a generated token for the penalties."""
        if self._is_seen is not None:
            self._is_seen[token_id] = True
        if self._counts is not None:
            self._counts[token_id] += 1

    def _edit(self, scores: NDArray[np.float32], position: int) -> None:
        masked = self._masked_early if position < self._params.min_tokens else self._masked
        if masked.size:
            scores[masked] = -math.inf
        if self._bias_ids.size:
            scores[self._bias_ids] += self._biases
        if self._is_seen is not None:
            penalty = self._params.repetition_penalty
            seen = np.flatnonzero(self._is_seen)
            values = scores[seen]
            scores[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts is not None:
            used = np.flatnonzero(self._counts)
            scores[used] -= self._params.presence_penalty + self._params.frequency_penalty * self._counts[used]


def draw(scores: NDArray[np.float32], params: SamplingParams, chance: float) -> int:
    """Choose a token from scores [V], which are overwritten: temperature, top_k, top_p, min_p, then the draw.

    Candidates are ordered by falling probability, equals by rising id, and each filter keeps a prefix of that order
    (top_k exactly that many, also among equals). The draw takes the first candidate at which the cumulative probability
    exceeds `chance`, from 0 to below 1, times the mass that is kept.

    Raises:
        MiniphiError: every score is minus infinity.
    """
    peak = scores.max()
    if peak == -math.inf:
        raise _nothing_left()
    scores -= peak
    scores /= max(params.temperature, _MIN_TEMPERATURE)
    limit = min(params.top_k or scores.size, scores.size)
    total = float(np.exp(scores).sum(dtype=np.float64)) if limit == scores.size else 0.0
    is_filtered = params.top_p < 1 or params.min_p > 0
    for count in _candidate_counts(limit, scores.size):
        ranked = _rank(scores, count)
        weights = np.exp(scores[ranked])
        cumulative = np.cumsum(weights, dtype=np.float64)
        if count == limit:
            total = float(cumulative[-1])
        kept = _count_kept(cumulative, weights, total, params)
        if kept > count < limit and is_filtered:
            continue
        mass = cumulative[kept - 1] if kept <= count else total
        place = int(np.searchsorted(cumulative, chance * mass, side="right"))
        if place < count:
            return int(ranked[place])
    raise _nothing_left()


def prompt_logprob(logits: NDArray[np.float32], token_id: int) -> PromptLogprob:
    """Score a prompt token with the logits [V] of the token before it.

    Raises:
        MiniphiError: a logit is not finite.
    """
    _check_finite(logits)
    return PromptLogprob(
        token_id=token_id,
        logprob=float(logits[token_id]) - _log_sum_exp(logits),
        is_greedy=int(logits.argmax()) == token_id,
    )


def uniform(seed: int, choice: int, position: int) -> float:
    """Return a number from 0 to below 1, on a grid of 2**-53, that depends on nothing but the arguments."""
    counter = struct.pack("<QQQ", seed % 2**64, choice, position)
    return (int.from_bytes(blake2b(counter, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def _candidate_counts(limit: int, vocab_size: int) -> Iterator[int]:
    count = min(_FIRST_CANDIDATES, limit) if limit == vocab_size else limit
    while count < limit:
        yield count
        count *= _CANDIDATE_GROWTH
    yield limit


def _count_kept(
    cumulative: NDArray[np.float64], weights: NDArray[np.float32], total: float, params: SamplingParams
) -> int:
    """Count the ranked candidates that top_p and min_p keep; one more than there are if the end is not among them."""
    kept = weights.size + 1
    if params.top_p < 1:
        kept = min(kept, int(np.searchsorted(cumulative, params.top_p * total, side="left")) + 1)
    if params.min_p > 0 and weights[-1] < params.min_p:
        kept = min(kept, int(np.count_nonzero(weights >= params.min_p)))
    return kept


def _rank(scores: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Return the ids of the `count` largest scores, largest first, equals by rising id."""
    num_groups = max(_MIN_GROUPS, 4 * count)
    group_size = scores.size // num_groups
    if group_size < 2:
        return np.argsort(-scores, kind="stable")[:count]
    # Split the scores into groups. The count-th largest of the groups' maxima is at most the count-th largest score,
    # and not far below it, so that few candidates are left to sort: ten times faster than a partition of all scores.
    maxima = scores[: group_size * num_groups].reshape(group_size, num_groups).max(axis=0)
    smallest = np.partition(maxima, num_groups - count)[num_groups - count]
    candidates = np.flatnonzero(scores >= smallest)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:count]]


def _log_sum_exp(logits: NDArray[np.float32]) -> float:
    peak = logits.max()
    return float(peak) + math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))


def _check_finite(logits: NDArray[np.float32]) -> None:
    # One sum is the cheapest test that every kind of bad value fails: infinities of both signs add up to NaN.
    with np.errstate(invalid="ignore"):
        total = float(logits.sum())
    if not math.isfinite(total):
        bad = int(np.count_nonzero(~np.isfinite(logits)))
        raise MiniphiError(
            f"the model returned {bad} logits of {logits.size} that are not finite numbers; its weights are damaged or "
            "its activations overflowed"
        )


def _nothing_left() -> MiniphiError:
    return MiniphiError(
        "every token of the vocabulary is masked, so none can be sampled; check the unused and stop ids"
    )
