"""The model in NumPy, one operation at a time: `Program.run(batch, reference=True)`.

Slow and plain. Owns a cache of its own, rounded as the native one is.
"""

import numpy as np
from numpy.typing import NDArray

from miniphi.config import ModelConfig
from miniphi.engine.batch import KV_BLOCK_SIZE, Batch
from miniphi.engine.model import forward
from miniphi.engine.weights import Matrices, ModelWeights
from miniphi.kernels import CacheType, PackedMatrix, reference

__all__ = ["ReferenceRunner"]

Floats = NDArray[np.float32]


class ReferenceRunner:
    """Holds the reference cache between steps."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, num_kv_blocks: int, kv_type: CacheType) -> None:
        self.config = config
        self._weights = weights
        shape = (
            config.num_hidden_layers,
            2,
            num_kv_blocks * KV_BLOCK_SIZE,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.cache = np.zeros(shape, np.float32)
        self.kv_type = kv_type

    def run(self, batch: Batch, cos: Floats, sin: Floats) -> Floats:
        """Run one step and return logits [R, vocab_size]."""
        return forward(_Step(self, batch, cos, sin), self.config, self._weights)


class _Step:
    """Computes each operation of `forward` at once; a value is an array [rows, width]."""

    def __init__(self, runner: "ReferenceRunner", batch: Batch, cos: Floats, sin: Floats) -> None:
        self._config, self._cache, self._kv_type = runner.config, runner.cache, runner.kv_type
        self._batch, self._cos, self._sin = batch, cos, sin

    def embed(self, table: PackedMatrix) -> Floats:
        return table.unpack()[self._batch.token_ids]

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        return reference.rms_norm(x, weight, eps)

    def matmul(self, x: Floats, matrices: Matrices, *, add_to: Floats | None = None) -> Floats:
        product = np.concatenate([reference.packed_matmul(x, matrix) for matrix in matrices], axis=-1)
        return product if add_to is None else add_to + product

    def silu_mul(self, gate_up: Floats) -> Floats:
        return reference.silu_mul(gate_up)

    def take_logit_rows(self, x: Floats) -> Floats:
        return x[self._batch.logit_rows]

    def logits(self, x: Floats, matrices: Matrices) -> Floats:
        return np.concatenate([reference.packed_matmul(x, matrix, fine=True) for matrix in matrices], axis=-1)

    def rope_and_append(self, qkv: Floats, *, layer: int) -> None:
        query, key, value = self._heads(qkv)
        query[...] = reference.rotate(query, self._cos, self._sin)
        key[...] = reference.rotate(key, self._cos, self._sin)
        slots = np.concatenate([self._slots(s)[self._positions(s)] for s in range(len(self._batch.context_lens))])
        self._cache[layer, 0, slots] = reference.round_keys(key, self._kv_type)
        self._cache[layer, 1, slots] = reference.round_values(value, self._kv_type)

    def attention(self, qkv: Floats, *, layer: int) -> Floats:
        query = reference.round_queries(self._heads(qkv)[0], self._kv_type)
        outputs = []
        for s, (start, stop) in enumerate(zip(self._batch.query_starts, self._batch.query_starts[1:], strict=False)):
            keys, values = self._cache[layer, :, self._slots(s)].swapaxes(0, 1)
            window = self._config.sliding_window
            outputs.append(reference.attention(query[start:stop], keys, values, self._positions(s), window))
        return np.concatenate(outputs).reshape(len(qkv), -1)

    def _heads(self, qkv: Floats) -> tuple[Floats, Floats, Floats]:
        """Views of q, k and v, each [tokens, heads, head_dim]."""
        config = self._config
        heads = qkv.reshape(len(qkv), -1, config.head_dim)
        first, second = config.num_attention_heads, config.num_attention_heads + config.num_key_value_heads
        return heads[:, :first], heads[:, first:second], heads[:, second:]

    def _positions(self, s: int) -> NDArray[np.int32]:
        return self._batch.positions[self._batch.query_starts[s] : self._batch.query_starts[s + 1]]

    def _slots(self, s: int) -> NDArray[np.int64]:
        """Where the sequence's tokens lie in the cache, by position."""
        position = np.arange(self._batch.context_lens[s])
        blocks = self._batch.block_tables[s].astype(np.int64)
        return np.asarray(blocks[position // KV_BLOCK_SIZE] * KV_BLOCK_SIZE + position % KV_BLOCK_SIZE)
