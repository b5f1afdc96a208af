"""Lossless speculation: which tokens to guess, and when a guess is worth its cost.

A guess is what followed the same tokens earlier in the sequence itself (prompt and answer). It is computed together
with the next token, in one step of several rows, and each row is sampled as it would have been without the guess: the
part of the guess that comes true has saved its steps, and the tokens are the same for every sampling option.

Every sequence is looked up at every token, whether or not the guess is then used, so how often guesses come true is
measured at no cost; and what a step of so many rows takes is measured as it goes. A guess is computed only where these
two promise a gain. Nothing has to be tried out to learn that it does not work.

A draft model (drafting.py) may guess for the sequences that repeat nothing.

Owns guesses, their chances and costs. Knows neither scheduling nor sampling.
Source of looking up: Saxena, "Prompt Lookup Decoding" (2023), and LLMA (arXiv 2304.04487); of verifying with the noise
of the plain run: any sampler whose noise belongs to a position, as ours does.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

__all__ = ["MAX_DRAFT", "MAX_ROWS", "MIN_GAIN", "PromptLookup", "StepCosts", "index_ngrams", "plan_drafts"]

MAX_DRAFT = 15
"""Tokens guessed at once for one sequence."""
MAX_ROWS = 32
"""Rows of a step with guesses, all sequences together: with more, every machine is bound by arithmetic."""
MIN_GAIN = 1.05
"""Tokens per second that a step with guesses must promise, relative to one without: chances and costs are estimates."""

_ID_BITS = 21
"""Bits of a token id in a key; three fit an int64."""
_MAX_MATCH = 16
"""Longer matches are not told apart."""
_FIRST_CHANCES = (0.3, 0.5, 0.7, 0.85, 0.9)
"""That a guessed token comes true, by `_class_of` the match before it, while nothing was measured."""
_LEARNING_RATE = 1 / 12
_SMALLEST_CHANCE = 0.05
"""Of a guess that is worth thinking about: no machine computes a further row for less."""
_FIRST_ROW_COST = 0.15
"""What a further row adds to a step of one row before it was measured (SmolLM2, two cores: 0.01 to 0.2)."""
_LARGEST_SURPRISE = 2.0
"""A step that took longer than this many times the expected time was disturbed, and counts as this many."""
_LEVEL_RATE = 0.2
_SHAPE_RATE = 0.1


def index_ngrams(token_ids: Sequence[int]) -> dict[int, int]:
    """Return the position after the last occurrence of every two and every three tokens in a row."""
    ids = np.asarray(token_ids, np.int64)
    ends = range(2, len(ids) + 1)
    index: dict[int, int] = dict(zip(_pair(ids[:-1], ids[1:]).tolist(), ends, strict=True))
    index.update(zip(_triple(ids[:-2], ids[1:-1], ids[2:]).tolist(), ends[1:], strict=True))
    return index


class PromptLookup:
    """Guesses one sequence's next tokens, and knows how often its guesses came true."""

    def __init__(self, token_ids: "array[int]", prompt_index: Mapping[int, int], prompt_len: int) -> None:
        """Follow `token_ids`, to which others append; `prompt_index` is that of its first `prompt_len` tokens."""
        self._token_ids = token_ids
        self.prompt_index = prompt_index
        self._own_index: dict[int, int] = {}
        self._num_seen = prompt_len
        self._source: int | None = None
        self._match_len = 0
        self._chances = list(_FIRST_CHANCES)

    @property
    def has_guess(self) -> bool:
        """Whether the last tokens occurred before."""
        return self._source is not None

    def advance(self) -> None:
        """Take notice of the tokens that were appended: compare them with the guess, and guess again."""
        token_ids = self._token_ids
        for position in range(self._num_seen, len(token_ids)):
            if self._source is not None:
                self._check(token_ids[position])
            keys = self._keys_at(position)
            if self._source is None:
                self._look_up(keys, position + 1)
            for key in keys:
                self._own_index[key] = position + 1
        self._num_seen = len(token_ids)

    def chances(self, num_tokens: int) -> list[float]:
        """Return of each of the next tokens' guesses the chance that it and all before it come true.

        The list ends early where that becomes too unlikely to be of use.
        """
        chance, result = 1.0, []
        for offset in range(num_tokens):
            chance *= self._chances[_class_of(self._match_len + offset)]
            if chance < _SMALLEST_CHANCE:
                break
            result.append(chance)
        return result

    def draft(self, num_tokens: int) -> tuple[int, ...]:
        """Return the guess. Where it reaches the end of the sequence it goes on with itself: a text in a loop."""
        assert self._source is not None, "there is nothing to guess from"
        tokens = self._token_ids[self._source : self._source + num_tokens].tolist()
        while len(tokens) < num_tokens:
            tokens += tokens[: num_tokens - len(tokens)]
        return tuple(tokens)

    def _check(self, token_id: int) -> None:
        assert self._source is not None
        is_true = self._token_ids[self._source] == token_id
        index = _class_of(self._match_len)
        self._chances[index] += (is_true - self._chances[index]) * _LEARNING_RATE
        if is_true:
            self._source += 1
            self._match_len += 1
        else:
            self._source = None

    def _keys_at(self, position: int) -> tuple[int, ...]:
        """Return the keys of the three and the two tokens that end at a position, the most telling first."""
        if position < 1:
            return ()
        second, third = self._token_ids[position - 1], self._token_ids[position]
        if position < 2:
            return (_pair(second, third),)
        return _triple(self._token_ids[position - 2], second, third), _pair(second, third)

    def _look_up(self, keys: Iterable[int], end: int) -> None:
        for key in keys:
            source = self._own_index.get(key) or self.prompt_index.get(key)
            if source is not None:
                self._source = source
                self._match_len = self._count_equal(source, end)
                return

    def _count_equal(self, first: int, second: int) -> int:
        """Count the equal tokens before two positions, `first` the lower one."""
        token_ids = self._token_ids
        for count in range(1, min(first, _MAX_MATCH) + 1):
            if token_ids[first - count] != token_ids[second - count]:
                return count - 1
        return min(first, _MAX_MATCH)


class StepCosts:
    """What a step of so many rows takes, relative to a step of one: measured as steps go by."""

    def __init__(self, row_cost: float | None = None) -> None:
        """Measure, or take each row after the first to cost `row_cost` of a step of one."""
        self._row_cost = row_cost
        self._step_s: float | None = None
        self._measured = {1: 1.0}
        self._relative: dict[int, float] = {}

    @property
    def step_s(self) -> float | None:
        """Seconds of a step of one row, as far as they were measured."""
        return self._step_s

    def record(self, num_rows: int, seconds: float) -> None:
        """Learn from a step that computed nothing but one token of each sequence, and guesses."""
        if self._row_cost is not None:
            return
        if self._step_s is None:
            self._step_s = seconds / self.relative(num_rows)
        surprise = seconds / (self._step_s * self.relative(num_rows))
        surprise = min(max(surprise, 1 / _LARGEST_SURPRISE), _LARGEST_SURPRISE)
        # A step of one row only says how fast the machine is now; any other one says something of its shape, too.
        if num_rows > 1:
            self._measured[num_rows] = self.relative(num_rows) * surprise**_SHAPE_RATE
            self._relative.clear()
        self._step_s *= surprise**_LEVEL_RATE

    def relative(self, num_rows: int) -> float:
        """Return the expected time of a step, in steps of one row."""
        if num_rows not in self._relative:
            self._relative[num_rows] = 1 + self._find_row_cost(num_rows) * (num_rows - 1)
        return self._relative[num_rows]

    def _find_row_cost(self, num_rows: int) -> float:
        """Return what each row after the first costs in the measured step that is most like one of `num_rows`."""
        if self._row_cost is not None:
            return self._row_cost
        nearest = min(self._measured, key=lambda measured: (measured == 1, abs(measured - num_rows)))
        return _FIRST_ROW_COST if nearest == 1 else (self._measured[nearest] - 1) / (nearest - 1)


def plan_drafts(lookups: Sequence[PromptLookup | None], rooms: Sequence[int], costs: StepCosts) -> list[int]:
    """Return how many tokens to guess for each sequence of a step: none, unless that promises more tokens per second.

    `rooms` is how many may be guessed at most.
    """
    num_rows = len(lookups)
    offers = [
        (chance, index)
        for index, (lookup, room) in enumerate(zip(lookups, rooms, strict=True))
        if lookup is not None and lookup.has_guess
        for chance in lookup.chances(min(room, MAX_DRAFT))
    ]
    # Likely tokens first; a sequence's own stay in order, as each is less likely than the one before.
    offers.sort(key=itemgetter(0), reverse=True)
    expected = float(num_rows)
    best_speed, best_count = MIN_GAIN * expected / costs.relative(num_rows), 0
    for count, (chance, _) in enumerate(offers[: max(0, MAX_ROWS - num_rows)], start=1):
        expected += chance
        speed = expected / costs.relative(num_rows + count)
        if speed > best_speed:
            best_speed, best_count = speed, count
    lengths = [0] * num_rows
    for _, index in offers[:best_count]:
        lengths[index] += 1
    return lengths


def _class_of(match_len: int) -> int:
    """Return which matches are counted together: of 2, 3, 4 to 7, 8 to 15, and more tokens."""
    return 0 if match_len <= 2 else 1 if match_len == 3 else min(match_len, _MAX_MATCH).bit_length() - 1


def _pair(first: Any, second: Any) -> Any:
    """Return a key of two token ids, or of arrays of them."""
    return first << _ID_BITS | second


def _triple(first: Any, second: Any, third: Any) -> Any:
    """Return a key of three token ids, or of arrays of them; no pair has the same."""
    return (first + 1) << 2 * _ID_BITS | second << _ID_BITS | third
