"""What a caller asks for (`Request`), what it gets back (`SequenceOutput`) and one answer in the making (`Sequence`).

Knows token ids only: no text, no model, no arrays of numbers to compute with.
"""

import os
from array import array
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, get_args

from miniphi.engine.sampling_params import SamplingParams
from miniphi.errors import ContextLengthError, InvalidRequestError

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "FinishReason",
    "PromptLogprob",
    "Request",
    "RopePolicy",
    "Sequence",
    "SequenceOutput",
    "TokenLogprob",
]

RopePolicy = Literal["auto", "hf", "short", "long"]
"""Which LongRoPE factor set a request uses; without LongRoPE it changes nothing.

* auto: long if prompt and `max_tokens` together exceed the original context, so it never changes half-way;
* hf: short up to the original context, and long from the next token on, when the whole sequence is computed again,
  as transformers does;
* short, long: always that one.
"""
FinishReason = Literal["stop", "length"]

DEFAULT_MAX_TOKENS = 4096
"""Output limit of a request that names none: `maxOutputTokens` of the model's catalog entry."""
DEFAULT_ROOM = 1024
"""A request that names no limit stays inside the original context if that leaves at least so many tokens: a short chat
should not pay for long factors because its answer might have been long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt and how to continue it.

    Raises:
        InvalidRequestError: the prompt is empty, or a value is out of range whatever the model.
    """

    token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    rope_policy: RopePolicy = "auto"
    cache_salt: str = ""
    """cached prefixes are reused only between requests of the same salt"""
    prompt_logprobs_start: int | None = None
    """index of the first prompt token whose log-probability is wanted; at least 1, as nothing precedes token 0"""
    id: str = field(default_factory=lambda: os.urandom(16).hex())

    def __post_init__(self) -> None:
        """Refuse what no model could serve."""
        if not self.token_ids:
            raise InvalidRequestError("token_ids is empty; a prompt needs at least one token")
        if self.rope_policy not in get_args(RopePolicy):
            raise InvalidRequestError(f"rope_policy must be one of {get_args(RopePolicy)}, not {self.rope_policy!r}")
        start = self.prompt_logprobs_start
        if start is not None and not 1 <= start <= len(self.token_ids):
            raise InvalidRequestError(
                f"prompt_logprobs_start must be from 1 to the prompt's {len(self.token_ids)} tokens, not {start}"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidRequestError if a token id anywhere in the request is outside the vocabulary."""
        for name, token_ids in (
            ("token_ids", self.token_ids),
            ("stop_token_ids", self.params.stop_token_ids),
            ("logit_bias", self.params.logit_bias),
        ):
            _check_token_ids(name, token_ids, vocab_size)

    def resolve_max_tokens(self, context: int, original_context: int | None = None) -> int:
        """Return how many tokens may be generated; `original_context` is LongRoPE's border, if the model has one.

        Raises:
            ContextLengthError: prompt and answer do not fit the context.
        """
        prompt_len, max_tokens = len(self.token_ids), self.params.max_tokens
        if max_tokens is None:
            room = context - prompt_len
            if self.rope_policy == "auto" and original_context and original_context - prompt_len >= DEFAULT_ROOM:
                room = min(room, original_context - prompt_len)
            max_tokens = max(1, self.params.min_tokens, min(DEFAULT_MAX_TOKENS, room))
        if prompt_len + max_tokens > context:
            raise ContextLengthError(
                f"the prompt has {prompt_len} tokens and the answer up to {max_tokens}, together "
                f"{prompt_len + max_tokens}; the context is {context}. Shorten the prompt or lower max_tokens"
            )
        return max_tokens


def _check_token_ids(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    if not token_ids:
        return
    try:
        array("i", token_ids)
    except (TypeError, OverflowError) as error:
        raise InvalidRequestError(f"{name} must hold integers from 0 to {vocab_size - 1}: {error}") from error
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        raise InvalidRequestError(
            f"{name} holds {low if low < 0 else high}; the model's ids go from 0 to {vocab_size - 1}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """A token and its natural log-probability under the model's own distribution, before any sampling option."""

    token_id: int
    logprob: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLogprob:
    """The log-probability of one prompt token given all tokens before it."""

    token_id: int
    logprob: float
    is_greedy: bool
    """the model's most likely token was this one"""
    top_logprobs: tuple[TokenLogprob, ...] = ()
    """the most likely alternatives, best first, as many as `logprobs` asks for"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceOutput:
    """One new token of one sequence."""

    request_id: str
    index: int
    """which of the request's n sequences"""
    token_id: int
    """reported even when it is a stop id, so that the text layer can drop it"""
    logprob: float | None
    top_logprobs: tuple[TokenLogprob, ...] | None
    """the most likely alternatives, best first, if `logprobs` asked for them"""
    finish_reason: FinishReason | None
    prompt_logprobs: tuple[PromptLogprob, ...] | None
    """with the first token of sequence 0, if `prompt_logprobs_start` asked for them"""
    num_cached_tokens: int
    """prompt tokens that the prefix cache already held when the sequence was first admitted"""
    num_drafted: int
    """tokens of the sequence that were guessed so far"""
    num_accepted: int
    """those that came true"""


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """One answer in the making. The scheduler alone changes it."""

    request: Request
    index: int
    arrival: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    use_long_factors: bool
    leader: "Sequence | None"
    """the sequence of the same request that computes the shared prompt first; None if this one does"""
    token_ids: "array[int]"
    """prompt and output, C ints"""
    prompt_len: int
    next_prompt_logprob: int
    """index of the first prompt token whose logprob is still to be computed; `prompt_len` if none is"""
    num_computed: int = 0
    """tokens whose keys and values are in the cache"""
    block_table: "array[int]" = field(default_factory=lambda: array("i"))
    """physical blocks, C ints, enough for all `token_ids` while the sequence runs"""
    block_keys: list[bytes] = field(default_factory=list)
    """cache keys of the first full blocks, as far as they were needed"""
    is_prompt_computed: bool = False
    """the prompt was computed once, whether or not it is still in the cache"""
    num_cached_tokens: int | None = None
    """prompt tokens found in the prefix cache at the first admission; None before it"""
    num_drafted: int = 0
    """tokens that were guessed and computed"""
    num_accepted: int = 0
    """guessed tokens that came true"""
    is_finished: bool = False

    @property
    def may_start(self) -> bool:
        """Whether the shared prompt is computed, if another sequence computes it."""
        return self.leader is None or self.leader.is_prompt_computed or self.leader.is_finished

    @property
    def num_remaining(self) -> int:
        """Known tokens that are not in the cache."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.token_ids) - self.prompt_len

    @property
    def num_reusable(self) -> int:
        """Known tokens that may come from cached blocks: those before the first one whose logits are needed."""
        last = len(self.token_ids) - 1
        return last if self.next_prompt_logprob >= self.prompt_len else min(last, self.next_prompt_logprob - 1)

    def finish_reason(self) -> FinishReason | None:
        """Say why the sequence ends with its last token, or None if it goes on."""
        if self.token_ids[-1] in self.stop_token_ids:
            return "stop"
        return "length" if self.num_generated >= self.max_tokens else None
