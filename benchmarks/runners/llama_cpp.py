"""llama.cpp, through benchmarks/llama_cpp.py."""

import time
from pathlib import Path

from benchmarks.llama_cpp import F16, Q8_0, CacheOptions, LlamaCpp
from benchmarks.runners import CHUNK, CacheKind, token_ids


class Runner:
    """See benchmarks.runners.Runner."""

    def __init__(
        self,
        model: str,
        *,
        num_threads: int,
        context: int,
        streams: int,
        cache: CacheKind,
        is_deep: bool,
        flash_attention: bool | None = None,
    ):
        if cache == "int4":
            raise ValueError("this runner has no int4 cache")
        quantized = Q8_0 if cache == "int8" else F16
        self._model = LlamaCpp(
            Path(model),
            vocab_size=0,
            num_threads=num_threads,
            context=streams * (context + CHUNK),  # a chunk more to copy from
            streams=2 if is_deep else streams,
            cache=CacheOptions(
                flash_attention=flash_attention,
                key_type=quantized,
                value_type=F16 if flash_attention is False else quantized,
                is_shared=is_deep,
            ),
        )
        self._is_deep, self._is_filled = is_deep, False

    def prefill(self, num_tokens: int) -> float:
        """See benchmarks.runners.Runner."""
        self._model.reset()
        start = time.perf_counter()
        self._prompt(num_tokens, 0)
        return num_tokens / (time.perf_counter() - start)

    def decode(self, depth: int, num_tokens: int, streams: int) -> float:
        """See benchmarks.runners.Runner."""
        self._fill(depth, streams)
        start = time.perf_counter()
        for step in range(num_tokens):
            tokens, positions = token_ids(depth + step, 1) * streams, [depth + step] * streams
            self._model.run(tokens, positions, range(streams), range(streams))
        return streams * num_tokens / (time.perf_counter() - start)

    def _fill(self, depth: int, streams: int) -> None:
        if self._is_filled:
            self._model.cut(0, depth)
            return
        self._model.reset()
        if not self._is_deep:
            for sequence in range(streams):
                self._prompt(depth, sequence)
            return
        self._prompt(CHUNK, 0)
        self._model.repeat(CHUNK, depth)
        self._is_filled = True

    def _prompt(self, num_tokens: int, sequence: int) -> None:
        for start in range(0, num_tokens, CHUNK):
            count = min(CHUNK, num_tokens - start)
            last = [count - 1] if start + count == num_tokens else []
            self._model.run(token_ids(start, count), range(start, start + count), [sequence] * count, last)
