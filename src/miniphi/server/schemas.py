"""Request bodies of the OpenAI API, field by field, and what each becomes for the engine.

A field is honoured, or accepted at its neutral value only, or refused by name: nothing is ignored. Fields of no effect
on an answer (user, metadata, store) are taken and left alone. Knows no HTTP.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from miniphi.engine import SamplingParams
from miniphi.errors import InvalidRequestError

__all__ = ["ChatRequest", "CompletionRequest", "DetokenizeRequest", "StreamOptions", "TokenizeRequest"]

MAX_STOPS = 4
MAX_COMPLETION_LOGPROBS = 5

TokenIds = Annotated[list[int], Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """What a stream brings besides the answer."""

    include_usage: bool = False


class _TextPart(_Body):
    type: Literal["text"]
    text: str


class _Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def to_message(self) -> dict[str, Any]:
        """Return what `LLM.chat` takes; parts of a text are joined, and a developer is the system."""
        parts = self.content
        content = "".join(part.text for part in parts) if isinstance(parts, list) else parts
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        for name in ("name", "tool_calls", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        return message


class _ResponseFormat(_Body):
    type: Literal["text"]


class _Sampling(_Body):
    """What both kinds of completion have in common. The fields after `user` are extensions, named as in vLLM."""

    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    user: str | None = None
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings are allowed, found {len(stop)}")
        return stop

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream true")
        return self

    def blame(self, error: Exception, otherwise: str) -> str:
        """Return the field that an error's message begins with, or `otherwise`."""
        name = str(error).partition(" ")[0].rstrip(":")
        return name if name in type(self).model_fields else otherwise

    def _sampling(self, **more: Any) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "n": self.n,
            "stop": None if stop is None else tuple(stop),
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": None if self.logit_bias is None else _token_biases(self.logit_bias),
            "seed": self.seed,
            "top_k": None if self.top_k is None else max(0, self.top_k),  # -1 is vLLM's word for off
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
        }
        return SamplingParams(**{name: value for name, value in (given | more).items() if value is not None})


class ChatRequest(_Sampling):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: _ResponseFormat | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is allowed only with logprobs true")
        return self

    def to_sampling(self) -> SamplingParams:
        """Return how to choose tokens. Raises InvalidRequestError."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._sampling(max_tokens=max_tokens, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class CompletionRequest(_Sampling):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    suffix: Literal[""] | None = None
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_COMPLETION_LOGPROBS)

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError(f"best_of {self.best_of} is not supported; it must equal n, which is {self.n or 1}")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several prompts, each a text or token ids. Raises InvalidRequestError if there are none."""
        if not self.prompt:
            raise InvalidRequestError("prompt is empty; give at least one character or token")
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def to_sampling(self) -> SamplingParams:
        """Return how to choose tokens: 16 of them where nothing is said, as OpenAI does. Raises InvalidRequestError."""
        wanted = 16 if self.max_tokens is None else self.max_tokens
        return self._sampling(max_tokens=max(1, wanted), logprobs=self.logprobs)


class TokenizeRequest(_Body):
    """Body of POST /tokenize: a text, or a conversation as the chat template renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(_Body):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token_id): bias for token_id, bias in biases.items()}
    except ValueError:
        wrong = next(token_id for token_id in biases if not token_id.isdigit())
        raise InvalidRequestError(f"logit_bias: {wrong!r} is not a token id") from None
