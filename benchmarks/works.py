"""What is measured: each work is one row of the table."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.runners import CHUNK, CacheKind

SMALL, LARGE = "smollm2-135m-instruct", "phi-3-mini-128k-instruct"
MODELS = (SMALL, LARGE)

FIRST_TOKEN_PROMPT = 8
"""Tokens of the prompt that a fresh process answers."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One row: `num_tokens` of a prompt, or of every one of `streams` sequences, each after `depth` tokens."""

    name: str
    label: str
    kind: Literal["prefill", "decode", "start", "command"]
    num_tokens: int
    depth: int = 0
    streams: int = 1
    slices: int = 1
    """Samples a repeat: short ones, so that the limits measured between them are those of the same moment"""
    cache: CacheKind = "default"
    models: tuple[str, ...] = MODELS
    is_ours_only: bool = False
    is_quick: bool = False
    """Part of a run with --quick"""

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self.depth + self.num_tokens

    @property
    def is_deep(self) -> bool:
        """Whether the cache is filled once and kept."""
        return self.kind == "decode" and self.depth >= CHUNK

    @property
    def unit(self) -> str:
        """Tokens per second of all streams together, or seconds."""
        return "tok/s" if self.kind in ("prefill", "decode") else "s"


WORKS = (
    Work(
        name="prefill-512",
        label="prefill, 512 tokens, int8 cache",
        kind="prefill",
        num_tokens=512,
        cache="int8",
        is_quick=True,
    ),
    Work(
        name="prefill-4096",
        label="prefill, 4,096 tokens, int8 cache",
        kind="prefill",
        num_tokens=4096,
        cache="int8",
        models=(LARGE,),
    ),
    Work(name="decode", label="decode, depth 16", kind="decode", num_tokens=8, depth=16, slices=6, is_quick=True),
    Work(
        name="decode-4096",
        label="decode, depth 4,096, int8 cache",
        kind="decode",
        num_tokens=4,
        depth=4096,
        slices=4,
        cache="int8",
        models=(LARGE,),
    ),
    Work(
        name="decode-16384",
        label="decode, depth 16,384, int8 cache",
        kind="decode",
        num_tokens=4,
        depth=16384,
        slices=2,
        cache="int8",
        models=(LARGE,),
    ),
    Work(
        name="decode-131072",
        label="decode at the end of 131,072 tokens, int4 cache",
        kind="decode",
        num_tokens=2,
        depth=131072 - 8,
        slices=2,
        cache="int4",
        models=(LARGE,),
        is_ours_only=True,
    ),
    Work(
        name="streams-8",
        label="decode, 8 streams together, int8 cache",
        kind="decode",
        num_tokens=16,
        depth=32,
        slices=2,
        streams=8,
        cache="int8",
        is_quick=True,
    ),
    Work(
        name="start",
        label="fresh process to first token, token ids in",
        kind="start",
        num_tokens=FIRST_TOKEN_PROMPT,
        is_quick=True,
    ),
    Work(
        name="start-command",
        label="`miniphi generate` to its first character",
        kind="command",
        num_tokens=1,
        models=(SMALL,),
        is_ours_only=True,
    ),
)
