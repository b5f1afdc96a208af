"""What a process of `benchmarks.worker` runs: one engine each, in whatever environment the engine lives in.

Every module here has a class `Runner`. It imports its own engine and nothing of the others, and nothing that it can do
without, because the time from the start of a process to its first token is measured too.
"""

from typing import Literal, Protocol, TypeAlias

CacheKind: TypeAlias = Literal["default", "int8", "int4"]
"""How keys and values are kept; "default" is what the engine does when nobody says anything."""

CHUNK = 512
"""Tokens of a prompt that are handed over at once, where the caller cuts prompts; and the depth from which a cache is
filled by other means than a prompt."""

NUM_TOKEN_IDS = 200
"""Prompts go round through this many token ids; which they are does not matter."""


class Runner(Protocol):
    """An engine that can be timed.

    It is made from a model's path, `num_threads`, `context` (tokens of the longest sequence), `streams`, `cache`, and
    `is_deep`: whether a depth of CHUNK tokens or more is decoded at, so that the cache is worth keeping.
    """

    def prefill(self, num_tokens: int) -> float:
        """Return the tokens per second of one prompt, to the logits or the choice of its next token."""

    def decode(self, depth: int, num_tokens: int, streams: int) -> float:
        """Return the tokens per second of all streams together, each after `depth` tokens of its own.

        From a depth of CHUNK on, the cache is filled once in the life of the runner.
        """


def token_ids(start: int, count: int) -> list[int]:
    """Return the same prompt for every engine."""
    return [1 + position % NUM_TOKEN_IDS for position in range(start, start + count)]
