"""What the public API returns: typed, frozen values. Knows neither the engine nor the tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "Alternative",
    "Choice",
    "Chunk",
    "Completion",
    "FinishReason",
    "LogLikelihood",
    "Perplexity",
    "Timings",
    "TokenLogprob",
    "Usage",
]

FinishReason = Literal["stop", "length"]
"""`stop`: a stop token or a stop string ended the answer. `length`: max_tokens did."""


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A token that could have come at one position. `logprob` is the natural logarithm of its probability."""

    token_id: int
    text: str
    token_bytes: bytes
    logprob: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; the bytes become a list of numbers, because a token may be half a character."""
        return {
            "token_id": self.token_id,
            "text": self.text,
            "bytes": list(self.token_bytes),
            "logprob": self.logprob,
        }


@dataclass(frozen=True, kw_only=True)
class TokenLogprob(Alternative):
    """A token that was generated, and the most probable ones at its position, best first."""

    alternatives: tuple[Alternative, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, alternatives included."""
        return super().to_dict() | {"alternatives": [other.to_dict() for other in self.alternatives]}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts of one request, all its choices together.

    `cached_tokens` of the `prompt_tokens` came from the prefix cache and cost no computation; 0 until the first token.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    def to_dict(self) -> dict[str, int]:
        """Return JSON values."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
            "cached_tokens": self.cached_tokens,
        }


@dataclass(frozen=True, kw_only=True)
class Timings:
    """How fast one request was, as its caller saw it; a rate is None where there was nothing to measure.

    `prompt_tokens_per_s` counts the prompt tokens that were computed, over the time to the first token;
    `completion_tokens_per_s` counts the tokens after the first one, over the time between the first and the last.
    `drafted_tokens` were guessed ahead of the model (see SamplingParams.speculate); `accepted_tokens` of them came true
    and saved a step each.
    """

    time_to_first_token_s: float | None
    prompt_tokens_per_s: float | None
    completion_tokens_per_s: float | None
    total_s: float
    drafted_tokens: int
    accepted_tokens: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return JSON values."""
        return {
            "time_to_first_token_s": self.time_to_first_token_s,
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "completion_tokens_per_s": self.completion_tokens_per_s,
            "total_s": self.total_s,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
        }


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One answer.

    `token_ids` are all tokens that were generated, the stop token or the tokens of the stop string included;
    `text` ends before them. `logprobs` has one entry per token when they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "index": self.index,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "logprobs": None if self.logprobs is None else [token.to_dict() for token in self.logprobs],
        }


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Everything that one request gave: `n` choices, token counts, speed, and the model's name."""

    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, as `miniphi generate --json` prints them."""
        return {
            "model": self.model,
            "choices": [choice.to_dict() for choice in self.choices],
            "usage": self.usage.to_dict(),
            "timings": self.timings.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The next piece of one choice of a streamed answer.

    Joined in order, the chunks of a choice have its text, token ids and logprobs. `finish_reason` is set on the last
    chunk of a choice; `usage` and `timings` on the last chunk of the stream.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(frozen=True, kw_only=True)
class LogLikelihood:
    """How probable the model finds a continuation of a context.

    `logprob` is the sum of `token_logprobs` (natural logarithms), one per token of the continuation.
    `is_greedy` says that every one of its tokens was the most probable one, so that greedy decoding would write it.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool
    token_logprobs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well the model predicts a text: `perplexity` = exp(`nll` / `num_tokens`), `nll` in nats."""

    nll: float
    num_tokens: int
    perplexity: float

    def to_dict(self) -> Mapping[str, float | int]:
        """Return JSON values."""
        return {"nll": self.nll, "num_tokens": self.num_tokens, "perplexity": self.perplexity}
