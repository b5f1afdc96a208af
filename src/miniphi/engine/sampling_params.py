"""How the tokens of one request are chosen: `SamplingParams` and the checks of its values.

Knows nothing of the model: what depends on the vocabulary or the context is checked when a request is submitted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from miniphi.errors import InvalidRequestError

__all__ = ["MAX_LOGPROBS", "MAX_SEQUENCES_PER_REQUEST", "MAX_STOP_STRINGS", "SamplingParams", "Speculation"]

Speculation = Literal["auto", "lookup", "off"]
"""How tokens are guessed ahead of the model.

* off: not at all;
* lookup: as the sequence went on after an earlier occurrence of its last tokens, where that promises to be faster;
* auto: the same, and where that finds nothing by the draft model, if the engine has one.
"""

MAX_LOGPROBS = 20
"""Alternatives a token may be reported with, as in the OpenAI API."""
MAX_SEQUENCES_PER_REQUEST = 128
"""Largest n, as in the OpenAI API."""
MAX_STOP_STRINGS = 32
MAX_STOP_STRING_CHARACTERS = 1024
MAX_ABSOLUTE_PENALTY = 2.0
"""Range of presence_penalty and frequency_penalty, as in the OpenAI API."""
MAX_ABSOLUTE_BIAS = 100.0
"""Range of a logit_bias, as in the OpenAI API."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens. The steps are applied in the order of `ReferenceSampler.sample`.

    Raises:
        InvalidRequestError: a value is out of range; the message names the field.
    """

    temperature: float = 1.0
    """0 is greedy: the largest logit, the lowest id among equals"""
    top_k: int = 0
    """0 is off"""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """over prompt and output, as in transformers"""
    presence_penalty: float = 0.0
    """over the output, as in the OpenAI API"""
    frequency_penalty: float = 0.0
    """over the output, as in the OpenAI API"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """None draws a fresh one for each request"""
    logprobs: int | None = None
    """alternatives reported with each token; 0 reports the chosen token's alone, None nothing"""
    n: int = 1
    stop: tuple[str, ...] = ()
    """stop strings; the engine leaves them to the text layer"""
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    """None is the smaller of 4096 and what the context leaves"""
    min_tokens: int = 0
    """stop ids are not sampled before this many tokens"""
    ignore_eos: bool = False
    """go on after the model's own stop ids; those of `stop_token_ids` still stop"""
    speculate: Speculation = "auto"
    """how to guess tokens ahead; changes the speed and never a token"""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _check_number("temperature", self.temperature, low=0.0)
        _check_number("top_p", self.top_p, low=0.0, high=1.0, is_low_open=True)
        _check_number("min_p", self.min_p, low=0.0, high=1.0)
        _check_number("repetition_penalty", self.repetition_penalty, low=0.0, is_low_open=True)
        _check_number("presence_penalty", self.presence_penalty, low=-MAX_ABSOLUTE_PENALTY, high=MAX_ABSOLUTE_PENALTY)
        _check_number("frequency_penalty", self.frequency_penalty, low=-MAX_ABSOLUTE_PENALTY, high=MAX_ABSOLUTE_PENALTY)
        _check_integer("top_k", self.top_k, low=0)
        _check_integer("n", self.n, low=1, high=MAX_SEQUENCES_PER_REQUEST)
        _check_integer("min_tokens", self.min_tokens, low=0)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS)
        if self.seed is not None:
            _check_integer("seed", self.seed, low=-(2**63), high=2**64 - 1)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, low=1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequestError(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}")
        if self.speculate not in get_args(Speculation):
            raise InvalidRequestError(f"speculate must be one of {get_args(Speculation)}, not {self.speculate!r}")
        self._check_collections()

    def _check_collections(self) -> None:
        if not isinstance(self.stop, (tuple, list)):
            raise InvalidRequestError(f"stop must be a tuple of strings, not {type(self.stop).__name__}")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_CHARACTERS:
                raise InvalidRequestError(
                    f"stop must hold strings of 1 to {MAX_STOP_STRING_CHARACTERS} characters, not {text!r:.80}"
                )
        for token_id in self.stop_token_ids:
            _check_integer("stop_token_ids", token_id, low=0)
        for token_id, bias in self.logit_bias.items():
            _check_integer("logit_bias token id", token_id, low=0)
            _check_number(f"logit_bias of token {token_id}", bias, low=-MAX_ABSOLUTE_BIAS, high=MAX_ABSOLUTE_BIAS)


def _check_number(name: str, value: float, *, low: float, high: float = math.inf, is_low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequestError(f"{name} must be a finite number, not {value!r}")
    if value < low or value > high or (is_low_open and value == low):
        bound = f"above {low:g}" if is_low_open else f"at least {low:g}"
        limit = "" if high == math.inf else f" and at most {high:g}"
        raise InvalidRequestError(f"{name} must be {bound}{limit}, not {value!r}")


def _check_integer(name: str, value: int, *, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be an integer, not {value!r}")
    if value < low or (high is not None and value > high):
        limit = "" if high is None else f" and at most {high}"
        raise InvalidRequestError(f"{name} must be at least {low}{limit}, not {value}")
