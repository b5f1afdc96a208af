"""A model made ready to run: packed weights, the paged cache, and one native call per step.

Owns the recording of `model.forward` into a native program and the memory that goes with it. Knows no requests.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from miniphi.config import ModelConfig
from miniphi.engine.batch import KV_BLOCK_SIZE, Batch
from miniphi.engine.model import forward
from miniphi.engine.packed_file import PackedModel
from miniphi.engine.reference import ReferenceRunner
from miniphi.engine.rope import RopeTables
from miniphi.engine.weights import Matrices, ModelWeights, pack_weights
from miniphi.errors import CapacityError, ContextLengthError, InvalidRequestError, UnsupportedModelError
from miniphi.kernels import CacheType, NativeProgram, PackedMatrix, cache_block_bytes, default_num_threads, selected_isa
from miniphi.models import machine_memory

if TYPE_CHECKING:
    from miniphi.checkpoint import StoredTensor

__all__ = ["Program", "UnpackedModel", "load_program"]

MAX_HEAD_DIM = 512
SPARE_MEMORY_FRACTION = 0.1
"""Of the available memory, left to the system and to activations when the cache's size is ours to choose."""


class _Recorder:
    """Records operations into a native program; a value is the id of a buffer.

    A buffer is shared by all results of one operation and width: inside `forward` no two of them live at once.
    """

    def __init__(self, native: NativeProgram, query_width: int) -> None:
        self._native = native
        self._query_width = query_width
        self._buffers: dict[tuple[str, int, bool], int] = {}
        self._shapes: dict[int, tuple[int, bool]] = {}

    def _buffer(self, role: str, width: int, *, of_logit_rows: bool) -> int:
        key = (role, width, of_logit_rows)
        if key not in self._buffers:
            self._buffers[key] = self._native.add_buffer(width, of_logit_rows)
            self._shapes[self._buffers[key]] = (width, of_logit_rows)
        return self._buffers[key]

    def embed(self, table: PackedMatrix) -> int:
        to = self._buffer("hidden", table.depth, of_logit_rows=False)
        self._native.embed(table, to)
        return to

    def rms_norm(self, x: int, weight: NDArray[np.float32], eps: float) -> int:
        width, of_logit_rows = self._shapes[x]
        to = self._buffer("normed", width, of_logit_rows=of_logit_rows)
        self._native.rms_norm(x, to, weight, eps)
        return to

    def matmul(self, x: int, matrices: Matrices, *, add_to: int | None = None) -> int:
        width = sum(matrix.rows for matrix in matrices)
        to = self._buffer("product", width, of_logit_rows=self._shapes[x][1]) if add_to is None else add_to
        self._native.matmul(x, to, matrices, add_to is not None)
        return to

    def rope_and_append(self, qkv: int, *, layer: int) -> None:
        self._native.rope_and_append(qkv, layer)

    def attention(self, qkv: int, *, layer: int) -> int:
        to = self._buffer("attended", self._query_width, of_logit_rows=False)
        self._native.attention(qkv, to, layer)
        return to

    def silu_mul(self, gate_up: int) -> int:
        width, of_logit_rows = self._shapes[gate_up]
        to = self._buffer("gated", width // 2, of_logit_rows=of_logit_rows)
        self._native.silu_mul(gate_up, to)
        return to

    def take_logit_rows(self, x: int) -> int:
        width, _ = self._shapes[x]
        role = next(role for (role, *_), buffer in self._buffers.items() if buffer == x)
        to = self._buffer(role, width, of_logit_rows=True)
        self._native.take_logit_rows(x, to)
        return to

    def logits(self, x: int, matrices: Matrices) -> int:
        self._native.matmul_to_logits(x, matrices)
        return x


class Program:
    """Runs batches of one model.

    The cache starts empty; whoever runs batches keeps its blocks apart. Not thread-safe: one step at a time.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        num_kv_blocks: int,
        kv_type: str = "f16",
        num_threads: int | None = None,
        max_batch_tokens: int = 512,
        max_logit_rows: int = 64,
        isa: str | None = None,
    ) -> None:
        if config.head_dim % 16 or config.head_dim > MAX_HEAD_DIM:
            raise UnsupportedModelError(
                f"head_dim is {config.head_dim}; the kernels take multiples of 16 up to {MAX_HEAD_DIM}"
            )
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_logit_rows", max_logit_rows)):
            if value < 1:
                raise InvalidRequestError(f"{name} is {value}; it must be at least 1")
        self.config = config
        self.weights = weights
        self.num_kv_blocks = num_kv_blocks
        self.kv_type = CacheType.parse(kv_type)
        self.max_batch_tokens = max_batch_tokens
        self.max_logit_rows = max_logit_rows
        self._rope = RopeTables(config)
        self._reference: ReferenceRunner | None = None
        heads = {
            "num_layers": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rotary_dim": config.rotary_dim,
            "window": config.sliding_window or 0,
        }
        num_threads = num_threads or default_num_threads()
        try:
            self.native = NativeProgram(
                selected_isa(isa),
                num_threads,
                max_batch_tokens,
                max_logit_rows,
                heads,
                int(self.kv_type),
                num_kv_blocks,
            )
        except MemoryError:
            raise CapacityError(
                f"no address space for a cache of {num_kv_blocks:,} blocks of {self.kv_block_bytes:,} bytes"
            ) from None
        forward(_Recorder(self.native, config.num_attention_heads * config.head_dim), config, weights)

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one cache block of 32 tokens, all layers."""
        config = self.config
        return cache_block_bytes(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, self.kv_type)

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence that both the model and the cache can hold."""
        return min(self.config.max_position_embeddings, self.num_kv_blocks * KV_BLOCK_SIZE)

    def run(self, batch: Batch, *, reference: bool = False) -> NDArray[np.float32]:
        """Run one step and return logits [R, vocab_size].

        With `reference`, in NumPy and on a cache of its own: a sequence must use one of the two throughout.
        """
        token_factors = batch.use_long_factors  # already one for each token where every sequence brings one
        if token_factors.size < batch.token_ids.size:
            token_factors = np.repeat(token_factors, np.diff(batch.query_starts))
        cos, sin = self._rope.rows(batch.positions, token_factors)
        if reference:
            self._reference = self._reference or ReferenceRunner(
                self.config, self.weights, self.num_kv_blocks, self.kv_type
            )
            return self._reference.run(batch, cos, sin)
        return self.native.run(
            batch.token_ids,
            batch.positions,
            batch.query_starts,
            batch.context_lens,
            batch.block_tables,
            cos,
            sin,
            batch.logit_rows,
        )


class UnpackedModel(Protocol):
    """A model whose weights are still to be packed, such as an open checkpoint."""

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""

    @property
    def tensors(self) -> "Mapping[str, StoredTensor]":
        """Its tensors by Hugging Face name."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""


def load_program(
    model: UnpackedModel | PackedModel,
    *,
    num_threads: int | None = None,
    kv_type: str = "f16",
    context: int | None = None,
    kv_memory_bytes: int | None = None,
    num_kv_blocks: int | None = None,
    max_batch_tokens: int = 512,
    max_logit_rows: int = 64,
    isa: str | None = None,
    beside: UnpackedModel | PackedModel | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Program:
    """Make a program whose cache holds `context` tokens; weights are packed first unless they are already.

    Without `context` the cache holds the model's whole context, or as much of it as this machine's memory does;
    `kv_memory_bytes` sets its size directly. `num_kv_blocks` asks for exactly so many blocks, for several sequences.

    `beside` is a model that will be loaded next and get as many blocks of the same type: memory is shared with it.

    Raises:
        ContextLengthError: `context` is beyond the model's positions.
        CapacityError: `context`, or `num_kv_blocks`, does not fit the memory.
    """
    config = model.config
    num_threads = num_threads or default_num_threads()
    models = (model,) if beside is None else (model, beside)
    block_bytes = sum(_block_bytes(each.config, kv_type) for each in models)
    weight_bytes = sum(each.num_bytes for each in models)
    if num_kv_blocks is None:
        num_kv_blocks = _num_blocks(config, block_bytes, weight_bytes, context, kv_memory_bytes)
    elif num_kv_blocks * block_bytes > (free := _free_bytes(weight_bytes)):
        raise CapacityError(
            f"{num_kv_blocks * KV_BLOCK_SIZE:,} tokens need {num_kv_blocks * block_bytes:,} bytes of cache; "
            f"the weights of {weight_bytes:,} bytes leave {free:,} of this machine's memory"
        )
    if isinstance(model, PackedModel):
        weights = model.weights
    else:
        weights = pack_weights(config, model.tensors, num_threads=num_threads, on_progress=on_progress)
    return Program(
        config,
        weights,
        num_kv_blocks=num_kv_blocks,
        kv_type=kv_type,
        num_threads=num_threads,
        max_batch_tokens=max_batch_tokens,
        max_logit_rows=max_logit_rows,
        isa=isa,
    )


def _block_bytes(config: ModelConfig, kv_type: str) -> int:
    return cache_block_bytes(
        config.num_hidden_layers, config.num_key_value_heads, config.head_dim, CacheType.parse(kv_type)
    )


def _free_bytes(weight_bytes: int) -> int:
    return max(0, int(machine_memory().available_bytes * (1 - SPARE_MEMORY_FRACTION)) - weight_bytes)


def _num_blocks(
    config: ModelConfig, block_bytes: int, weight_bytes: int, context: int | None, kv_memory_bytes: int | None
) -> int:
    limit = config.max_position_embeddings
    if context is not None and not 1 <= context <= limit:
        raise ContextLengthError(f"context is {context:,}; this model's positions allow 1 to {limit:,} tokens")
    wanted = -(-(context or limit) // KV_BLOCK_SIZE)
    if kv_memory_bytes is not None:
        affordable = kv_memory_bytes // block_bytes
        budget = f"--kv-memory of {kv_memory_bytes:,} bytes"
        wanted = wanted if context is not None else max(1, affordable)
    else:
        free = _free_bytes(weight_bytes)
        affordable = free // block_bytes
        budget = f"{free:,} bytes of memory that the weights leave"
    if affordable < 1 or (context is not None and wanted > affordable):
        raise CapacityError(
            f"a context of {wanted * KV_BLOCK_SIZE:,} tokens needs {wanted * block_bytes:,} bytes of cache; "
            f"the {budget} hold {affordable * KV_BLOCK_SIZE:,} tokens; choose a smaller context or a smaller kv type"
        )
    return min(wanted, affordable)
