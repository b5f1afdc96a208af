"""How fast a program is, as tokens per second and as a share of what the machine gave a moment before.

The limits are the int8 rate for prefill and the read bandwidth for decode, measured between any two samples, because
they change from one second to the next (docs/kernels.md).
Owns the arithmetic of work and bytes per token. Knows no text and no peer.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from miniphi.checkpoint import StoredTensor, TensorSource
from miniphi.config import ModelConfig
from miniphi.engine.batch import KV_BLOCK_SIZE, Batch
from miniphi.engine.program import Program
from miniphi.engine.weights import ModelWeights
from miniphi.errors import InvalidRequestError
from miniphi.kernels import Kind, MachineLimits, Meter

__all__ = [
    "INT8_RATE",
    "READ_BANDWIDTH",
    "LazyTensors",
    "SpeedReport",
    "measure_decode",
    "measure_prefill",
    "measure_speed",
]

SLICE_STEPS = 8
"""Tokens of every sequence that are decoded between two measurements of the limits"""

INT8_RATE, READ_BANDWIDTH = "int8 rate", "read bandwidth"
"""The limits, as a user reads them"""

NUM_TOKEN_IDS = 200
"""Measurements go round through the first token ids (fewer in a smaller vocabulary); which they are does not matter."""


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """Medians of several samples, of the limits beside them, and of the share of these that every sample reached."""

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
    meter = Meter(isa=program.native.isa, num_threads=program.native.num_threads)
    prefill = _sample(meter, repeats, lambda: measure_prefill(program, prompt_tokens))
    decode = _sample_decode(program, meter, depth=prompt_tokens, num_tokens=decode_tokens, streams=1, repeats=repeats)
    together = _sample_decode(
        program, meter, depth=KV_BLOCK_SIZE, num_tokens=decode_tokens, streams=streams, repeats=repeats
    )
    limits = _middle([sample.limits for sample in (*prefill, *decode, *together)])
    operations, quantized = prefill_operations(program.config, program.weights, prompt_tokens)
    bytes_per_token = decode_bytes(program, prompt_tokens)
    bounds = [_streams_bound(program, KV_BLOCK_SIZE, streams, sample.limits) for sample in together]
    return SpeedReport(
        isa=limits.isa,
        num_threads=limits.num_threads,
        int8_ops_per_s=limits.int8_ops_per_s,
        read_bytes_per_s=limits.read_bytes_per_s,
        weight_bytes=program.weights.num_bytes,
        prompt_tokens=prompt_tokens,
        prefill_tokens_per_s=statistics.median(sample.speed for sample in prefill),
        prefill_fraction=statistics.median(
            sample.speed * operations / sample.limits.int8_ops_per_s for sample in prefill
        )
        if quantized
        else None,
        decode_depth=prompt_tokens,
        decode_tokens_per_s=statistics.median(sample.speed for sample in decode),
        decode_fraction=statistics.median(
            sample.speed * bytes_per_token / sample.limits.read_bytes_per_s for sample in decode
        ),
        streams=streams,
        streams_tokens_per_s=statistics.median(sample.speed for sample in together),
        streams_fraction=statistics.median(
            sample.speed / bound for sample, (_, bound) in zip(together, bounds, strict=True)
        ),
        streams_limit=_streams_bound(program, KV_BLOCK_SIZE, streams, limits)[0],
    )


@dataclass(frozen=True, kw_only=True)
class _Sample:
    speed: float
    """tokens per second"""
    limits: MachineLimits
    """in the middle of it, as far as one can tell"""


def _sample(meter: Meter, count: int, measure: Callable[[], float]) -> list[_Sample]:
    """Measure so many times, and the machine's limits before and after each."""
    samples, before = [], meter.measure()
    for _ in range(count):
        speed, after = measure(), meter.measure()
        samples.append(_Sample(speed=speed, limits=_middle([before, after])))
        before = after
    return samples


def _sample_decode(
    program: Program, meter: Meter, *, depth: int, num_tokens: int, streams: int, repeats: int
) -> list[_Sample]:
    """Fill the cache once, then measure slices of a few steps, together about `repeats` times `num_tokens` of them."""
    steps = min(num_tokens, SLICE_STEPS)
    measure_decode(program, depth, steps, streams)
    count = repeats * max(1, num_tokens // steps)
    return _sample(meter, count, lambda: measure_decode(program, depth, steps, streams, is_filled=True))


def _middle(limits: list[MachineLimits]) -> MachineLimits:
    return MachineLimits(
        isa=limits[0].isa,
        num_threads=limits[0].num_threads,
        int8_ops_per_s=statistics.median(each.int8_ops_per_s for each in limits),
        read_bytes_per_s=statistics.median(each.read_bytes_per_s for each in limits),
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
