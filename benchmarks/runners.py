"""The same work in miniphi and in llama.cpp, on the same GGUF file: one prompt, one token after the other, streams.

Each runner returns seconds. Keys and values are float16 in both; neither samples.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.llama_cpp import LlamaCpp
from miniphi.checkpoint import open_checkpoint, write_synthetic_gguf
from miniphi.engine.program import load_program
from miniphi.engine.speed import FIRST_TOKEN_ID, measure_decode, measure_prefill
from miniphi.models import find_entry, resolve

STREAM_DEPTH = 32
"""Tokens in each stream's cache when streams are decoded together."""


class Runner(Protocol):
    """An engine that can be timed."""

    name: str

    def prefill(self, num_tokens: int) -> float:
        """Tokens per second of one prompt, with the logits of its last token."""

    def decode(self, depth: int, num_tokens: int, streams: int) -> float:
        """Tokens per second of all streams together, each after `depth` tokens."""


class Miniphi:
    """The engine of this repository."""

    name = "miniphi"

    def __init__(self, path: Path, *, num_threads: int, context: int) -> None:
        checkpoint = open_checkpoint(path)
        self.config = checkpoint.config
        self.program = load_program(checkpoint, num_threads=num_threads, context=context)

    def prefill(self, num_tokens: int) -> float:
        """See Runner."""
        return measure_prefill(self.program, num_tokens)

    def decode(self, depth: int, num_tokens: int, streams: int) -> float:
        """See Runner."""
        return measure_decode(self.program, depth, num_tokens, streams)


class Peer:
    """llama.cpp."""

    name = "llama.cpp"

    def __init__(self, path: Path, *, vocab_size: int, num_threads: int, context: int, streams: int) -> None:
        self._model = LlamaCpp(path, vocab_size=vocab_size, num_threads=num_threads, context=context, streams=streams)

    def prefill(self, num_tokens: int) -> float:
        """See Runner."""
        self._model.reset()
        start = time.perf_counter()
        self._fill(num_tokens, 0)
        return num_tokens / (time.perf_counter() - start)

    def decode(self, depth: int, num_tokens: int, streams: int) -> float:
        """See Runner."""
        self._model.reset()
        for sequence in range(streams):
            self._fill(depth, sequence)
        start = time.perf_counter()
        for step in range(num_tokens):
            tokens, positions = [FIRST_TOKEN_ID + step] * streams, [depth + step] * streams
            self._model.step(tokens, positions, range(streams), range(streams))
        return streams * num_tokens / (time.perf_counter() - start)

    def _fill(self, num_tokens: int, sequence: int) -> None:
        for start in range(0, num_tokens, 512):
            count = min(512, num_tokens - start)
            tokens = (FIRST_TOKEN_ID + np.arange(count) % 200).tolist()
            last: Sequence[int] = [count - 1] if start + count == num_tokens else []
            self._model.step(tokens, range(start, start + count), [sequence] * count, last)


def model_file(name: str, folder: Path) -> Path:
    """Return SmolLM2's file, or a synthetic Q4_0 file in the shape of a catalog model, written to `folder` once."""
    if name == "smollm2-135m-instruct":
        return resolve(name)
    path = folder / f"{name}.synthetic-q4_0.gguf"
    if not path.exists():
        print(f"writing {path} ...", flush=True)
        # llama.cpp needs no words to be timed
        write_synthetic_gguf(
            path, find_entry(name).model_config(), scheme="q4", tokenizer_metadata={"tokenizer.ggml.model": "no_vocab"}
        )
    return path
