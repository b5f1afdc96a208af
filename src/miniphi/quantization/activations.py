"""A model run over text in float32, all sequences side by side, with a visitor at every product.

Owns the operations behind `engine.model.forward`; a matrix is its name here, and the visitor computes the product.
Keeps the keys and values of one layer only. Knows no quantisation.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np
from numpy.typing import NDArray

from miniphi.checkpoint import Checkpoint
from miniphi.config import ModelConfig
from miniphi.engine.model import forward
from miniphi.engine.rope import RopeTables
from miniphi.engine.weights import Matrices, ModelWeights, assemble
from miniphi.kernels import PackedMatrix, reference

__all__ = ["Floats", "Visitor", "run_layers"]

Floats = NDArray[np.float32]

Visitor = Callable[[tuple[str, ...], Floats], Floats]
"""Gets the names of matrices and the activations x [tokens, K] that they share; returns x W^T, side by side."""


def run_layers(
    checkpoint: Checkpoint, token_ids: NDArray[np.int32], visit: Visitor, *, pool: ThreadPoolExecutor
) -> Floats:
    """Run the sequences `token_ids` [sequences, length] through all layers.

    Returns what the output matrix would be multiplied with, [sequences * length, hidden_size].
    """
    return forward(_Run(checkpoint, token_ids, visit, pool), checkpoint.config, _named_weights(checkpoint))


def _named_weights(checkpoint: Checkpoint) -> ModelWeights:
    """Return the model's weights with the name of each matrix in its place: `forward` only hands them on."""
    return assemble(
        checkpoint.config,
        matrix=lambda name: cast(PackedMatrix, name),
        vector=lambda name: checkpoint.tensors[name].to_float32(),
    )


class _Run:
    """Computes each operation of `forward` at once; a value is an array [tokens, width]."""

    def __init__(
        self, checkpoint: Checkpoint, token_ids: NDArray[np.int32], visit: Visitor, pool: ThreadPoolExecutor
    ) -> None:
        self._checkpoint, self._config = checkpoint, checkpoint.config
        self._ids, self._visit, self._pool = token_ids, visit, pool
        num_sequences, self._length = token_ids.shape
        positions = np.tile(np.arange(self._length, dtype=np.int32), num_sequences)
        # A sequence as short as these uses the short factors of LongRoPE.
        self._cos, self._sin = RopeTables(self._config).rows(positions, np.zeros(len(positions), np.bool_))

    def embed(self, table: PackedMatrix) -> Floats:
        return self._checkpoint.tensors[cast(str, table)].to_float32()[self._ids.ravel()]

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        return reference.rms_norm(x, weight, eps)

    def matmul(self, x: Floats, matrices: Matrices, *, add_to: Floats | None = None) -> Floats:
        product = self._visit(tuple(cast(str, matrix) for matrix in matrices), x)
        return product if add_to is None else add_to + product

    def rope_and_append(self, qkv: Floats, *, layer: int) -> None:
        query, key, _ = _heads(qkv, self._config)
        for heads in (query, key):
            heads[...] = reference.rotate(heads, self._cos, self._sin)

    def attention(self, qkv: Floats, *, layer: int) -> Floats:
        sequences = qkv.reshape(len(self._ids), self._length, -1)
        return np.concatenate(list(self._pool.map(lambda each: _attend(each, self._config), sequences)))

    def silu_mul(self, gate_up: Floats) -> Floats:
        return reference.silu_mul(gate_up)

    def take_logit_rows(self, x: Floats) -> Floats:
        return x

    def logits(self, x: Floats, matrices: Matrices) -> Floats:
        return x


def _heads(qkv: Floats, config: ModelConfig) -> tuple[Floats, Floats, Floats]:
    """Views of q, k and v, each [tokens, heads, head_dim]."""
    heads = qkv.reshape(len(qkv), -1, config.head_dim)
    first, second = config.num_attention_heads, config.num_attention_heads + config.num_key_value_heads
    return heads[:, :first], heads[:, first:second], heads[:, second:]


def _attend(qkv: Floats, config: ModelConfig) -> Floats:
    """Causal attention of one sequence by BLAS; `kernels.reference.attention` is the same for single tokens."""
    query, key, value = (heads.swapaxes(0, 1) for heads in _heads(qkv, config))
    group = config.num_attention_heads // config.num_key_value_heads
    key, value = np.repeat(key, group, axis=0), np.repeat(value, group, axis=0)
    scores = query @ key.swapaxes(1, 2) * np.float32(config.head_dim**-0.5)
    distance = np.arange(len(qkv))[:, None] - np.arange(len(qkv))
    scores[:, (distance < 0) | (distance >= (config.sliding_window or len(qkv)))] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return np.asarray((scores @ value).swapaxes(0, 1).reshape(len(qkv), -1))
