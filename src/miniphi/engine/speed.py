"""How fast a program is, as tokens per second and as a share of what the machine gave a moment before.

The limits are the int8 rate for prefill and the read bandwidth for decode, measured in the same run (docs/kernels.md).
Owns the arithmetic of work and bytes per token. Knows no text and no peer.
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from miniphi.checkpoint import StoredTensor, TensorSource
from miniphi.config import ModelConfig
from miniphi.engine.batch import KV_BLOCK_SIZE, Batch
from miniphi.engine.program import Program
from miniphi.engine.weights import ModelWeights
from miniphi.errors import InvalidRequestError
from miniphi.kernels import Kind, MachineLimits, measure_machine

__all__ = [
    "INT8_RATE",
    "READ_BANDWIDTH",
    "LazyTensors",
    "SpeedReport",
    "measure_decode",
    "measure_prefill",
    "measure_speed",
]

INT8_RATE, READ_BANDWIDTH = "int8 rate", "read bandwidth"
"""The limits, as a user reads them"""

NUM_TOKEN_IDS = 200
"""Measurements go round through the first token ids (fewer in a smaller vocabulary); which they are does not matter."""


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """Medians of several repetitions, and the limits measured before and after them."""

    isa: str
    num_threads: int
    int8_ops_per_s: float
    read_bytes_per_s: float
    weight_bytes: int
    prompt_tokens: int
    prefill_tokens_per_s: float
    prefill_fraction: float | None
    """of the int8 rate; None where the weights are not quantised"""
    decode_depth: int
    decode_tokens_per_s: float
    decode_fraction: float
    """of the read bandwidth; above 1 where a part of the weights stays in the caches"""
    streams: int
    streams_tokens_per_s: float
    streams_fraction: float
    streams_limit: str
    """INT8_RATE or READ_BANDWIDTH, whichever allows less"""

    def to_dict(self) -> dict[str, object]:
        """Return the fields for JSON."""
        return asdict(self)


class LazyTensors(Mapping[str, StoredTensor]):
    """Tensors that are made when they are packed and forgotten afterwards: random models without a file."""

    def __init__(self, sources: Mapping[str, TensorSource]) -> None:
        self._sources = sources

    def __getitem__(self, name: str) -> StoredTensor:
        source = self._sources[name]
        return StoredTensor(
            name=name, format=source.format, shape=source.shape, raw=source.read_rows(0, source.num_rows)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, none of which is made for this."""
        return sum(source.num_bytes for source in self._sources.values())


def measure_speed(
    program: Program, *, prompt_tokens: int = 512, decode_tokens: int = 32, streams: int = 8, repeats: int = 3
) -> SpeedReport:
    """Measure prefill of one prompt, decode of one sequence after it, and decode of several sequences together.

    Raises InvalidRequestError if the cache cannot hold them.
    """
    needed = _blocks(prompt_tokens + decode_tokens) + streams * _blocks(KV_BLOCK_SIZE + decode_tokens)
    if needed > program.num_kv_blocks:
        raise InvalidRequestError(
            f"the measurement needs {needed} cache blocks and there are {program.num_kv_blocks}; "
            "choose a shorter prompt, fewer streams or a larger context"
        )
    before = measure_machine(isa=program.native.isa, num_threads=program.native.num_threads)
    prefill = [measure_prefill(program, prompt_tokens) for _ in range(repeats)]
    decode = [measure_decode(program, prompt_tokens, decode_tokens) for _ in range(repeats)]
    together = [measure_decode(program, KV_BLOCK_SIZE, decode_tokens, streams) for _ in range(repeats)]
    after = measure_machine(isa=program.native.isa, num_threads=program.native.num_threads)
    limits = MachineLimits(
        isa=before.isa,
        num_threads=before.num_threads,
        int8_ops_per_s=max(before.int8_ops_per_s, after.int8_ops_per_s),
        read_bytes_per_s=max(before.read_bytes_per_s, after.read_bytes_per_s),
    )
    prefill_speed, decode_speed = statistics.median(prefill), statistics.median(decode)
    streams_speed = statistics.median(together)
    operations, quantized = prefill_operations(program.config, program.weights, prompt_tokens)
    bytes_per_token = decode_bytes(program, prompt_tokens + decode_tokens // 2)
    streams_limit, streams_bound = _streams_bound(program, KV_BLOCK_SIZE + decode_tokens // 2, streams, limits)
    return SpeedReport(
        isa=limits.isa,
        num_threads=limits.num_threads,
        int8_ops_per_s=limits.int8_ops_per_s,
        read_bytes_per_s=limits.read_bytes_per_s,
        weight_bytes=program.weights.num_bytes,
        prompt_tokens=prompt_tokens,
        prefill_tokens_per_s=prefill_speed,
        prefill_fraction=prefill_speed * operations / limits.int8_ops_per_s if quantized else None,
        decode_depth=prompt_tokens,
        decode_tokens_per_s=decode_speed,
        decode_fraction=decode_speed * bytes_per_token / limits.read_bytes_per_s,
        streams=streams,
        streams_tokens_per_s=streams_speed,
        streams_fraction=streams_speed / streams_bound,
        streams_limit=streams_limit,
    )


def measure_prefill(program: Program, num_tokens: int) -> float:
    """Return the tokens per second of one prompt, logits of its last token included."""
    start = time.perf_counter()
    _prefill(program, num_tokens, sequence=0, blocks=_blocks(num_tokens))
    return num_tokens / (time.perf_counter() - start)


def measure_decode(
    program: Program, depth: int, num_tokens: int, streams: int = 1, *, is_filled: bool = False
) -> float:
    """Return the tokens per second of all streams together, each after `depth` tokens of its own.

    With `is_filled` they are taken to be in the cache already, in its first blocks.
    """
    blocks = _blocks(depth + num_tokens)
    for sequence in range(0 if is_filled else streams):
        _prefill(program, depth, sequence, blocks)
    tables = np.arange(streams * blocks, dtype=np.int32).reshape(streams, blocks)
    start = time.perf_counter()
    for step in range(num_tokens):
        program.run(
            Batch(
                token_ids=np.full(streams, _token_ids(program, step, 1)[0], np.int32),
                positions=np.full(streams, depth + step, np.int32),
                query_starts=np.arange(streams + 1, dtype=np.int32),
                context_lens=np.full(streams, depth + step + 1, np.int32),
                block_tables=tables,
                use_long_factors=np.zeros(streams, np.bool_),
                logit_rows=np.arange(streams, dtype=np.int32),
            )
        )
    return streams * num_tokens / (time.perf_counter() - start)


def prefill_operations(config: ModelConfig, weights: ModelWeights, num_tokens: int) -> tuple[float, bool]:
    """Return the multiplications and additions of one prompt token, attention included; and whether they are int8."""
    matrices = [matrix for layer in weights.layers for matrix in layer.matrices]
    products = sum(matrix.rows * matrix.depth for matrix in matrices)
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * num_tokens
    return 2.0 * (products + attention), all(Kind(matrix.kind).is_quantized for matrix in matrices)


def decode_bytes(program: Program, depth: int) -> float:
    """Return the bytes that one token of one sequence must read: all weights once, and its part of the cache."""
    weights = program.weights
    matrices = [matrix for layer in weights.layers for matrix in layer.matrices] + list(weights.lm_head)
    return sum(matrix.num_bytes for matrix in matrices) + program.kv_block_bytes * depth / KV_BLOCK_SIZE


def _streams_bound(program: Program, depth: int, streams: int, limits: MachineLimits) -> tuple[str, float]:
    """Return which limit binds a step of several sequences, and the tokens per second that it allows."""
    cache_bytes = program.kv_block_bytes * depth / KV_BLOCK_SIZE
    step_bytes = decode_bytes(program, depth) + (streams - 1) * cache_bytes
    bounds = {READ_BANDWIDTH: streams * limits.read_bytes_per_s / step_bytes}
    operations, quantized = prefill_operations(program.config, program.weights, 2 * depth)
    operations += 2.0 * sum(matrix.rows * matrix.depth for matrix in program.weights.lm_head)
    if quantized:
        bounds[INT8_RATE] = limits.int8_ops_per_s / operations
    return min(bounds.items(), key=lambda bound: bound[1])


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // KV_BLOCK_SIZE)


def _token_ids(program: Program, start: int, count: int) -> NDArray[np.int32]:
    return (np.arange(start, start + count) % min(NUM_TOKEN_IDS, program.config.vocab_size)).astype(np.int32)


def _prefill(program: Program, num_tokens: int, sequence: int, blocks: int) -> None:
    table = np.arange(sequence * blocks, (sequence + 1) * blocks, dtype=np.int32)[None]
    for start in range(0, num_tokens, program.max_batch_tokens):
        stop = min(start + program.max_batch_tokens, num_tokens)
        count = stop - start
        program.run(
            Batch(
                token_ids=_token_ids(program, start, count),
                positions=np.arange(start, stop, dtype=np.int32),
                query_starts=np.array([0, count], np.int32),
                context_lens=np.array([stop], np.int32),
                block_tables=table,
                use_long_factors=np.zeros(1, np.bool_),
                logit_rows=np.array([count - 1] if stop == num_tokens else [], np.int32),
            )
        )
