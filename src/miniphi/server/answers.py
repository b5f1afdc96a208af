"""Parts that answers of several routes share. Shapes only: values in, JSON values out."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from miniphi.llm import Alternative, TokenLogprob, Usage
from miniphi.server.service import ModelService

__all__ = ["Stamp", "choice_logprobs", "token_name", "usage_of"]


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What identifies an answer."""

    id: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def new(cls, prefix: str, service: ModelService) -> "Stamp":
        """Return that of a new answer; `prefix` tells what kind it is."""
        id_ = f"{prefix}-{secrets.token_hex(16)}"
        return cls(id=id_, created=int(time.time()), model=service.name, fingerprint=service.fingerprint)

    def head(self, kind: str) -> dict[str, Any]:
        """Return the first fields of an answer of a kind, such as `chat.completion`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return token counts as OpenAI names them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def choice_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Return the log-probabilities of an answer's tokens, and of those that could have come, as chat has them."""
    return [_entry(token) | {"top_logprobs": [_entry(other) for other in token.alternatives]} for token in tokens]


def _entry(token: Alternative) -> dict[str, Any]:
    return {"token": token_name(token), "logprob": token.logprob, "bytes": list(token.token_bytes)}


def token_name(token: Alternative) -> str:
    """Return a token's text, or its bytes spelled out where they are a part of a character, as OpenAI does."""
    try:
        return token.token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token_bytes)
