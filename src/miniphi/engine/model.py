"""The model, written once: what a Phi-3 or Llama block computes.

`forward` names the operations in order. Whoever runs it supplies them: `program.py` records them into one native call,
`reference.py` computes each at once in NumPy.
"""

from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from miniphi.config import ModelConfig
from miniphi.engine.weights import Matrices, ModelWeights
from miniphi.kernels import PackedMatrix

__all__ = ["Operations", "forward"]

Value = TypeVar("Value")
"""What stands for an activation: a buffer id when recording, an array when computing."""


class Operations(Protocol[Value]):
    """The operations of the model. A value has one row per token of the step, or per row of logits."""

    def embed(self, table: PackedMatrix) -> Value:
        """Rows of the table at the step's token ids."""

    def rms_norm(self, x: Value, weight: NDArray[np.float32], eps: float) -> Value:
        """X / sqrt(mean(x^2) + eps) * weight."""

    def matmul(self, x: Value, matrices: Matrices, *, add_to: Value | None = None) -> Value:
        """X W^T, the matrices' outputs side by side; with `add_to`, added to that value in place."""

    def rope_and_append(self, qkv: Value, *, layer: int) -> None:
        """Rotate q and k in place; write k and v into the layer's cache."""

    def attention(self, qkv: Value, *, layer: int) -> Value:
        """Causal attention of q over the cache."""

    def silu_mul(self, gate_up: Value) -> Value:
        """silu(gate) * up for rows [gate | up]."""

    def take_logit_rows(self, x: Value) -> Value:
        """Only the rows whose logits are wanted."""

    def logits(self, x: Value, matrices: Matrices) -> Value:
        """The last matmul."""


def forward(ops: Operations[Value], config: ModelConfig, weights: ModelWeights) -> Value:
    """Return the logits of the rows that want them."""
    eps = config.rms_norm_eps
    h = ops.embed(weights.embed_tokens)
    for index, layer in enumerate(weights.layers):
        qkv = ops.matmul(ops.rms_norm(h, layer.input_layernorm, eps), layer.qkv_proj)
        ops.rope_and_append(qkv, layer=index)
        o = ops.attention(qkv, layer=index)
        if index == config.num_hidden_layers - 1:  # nobody attends to what follows: go on with the wanted rows only
            o, h = ops.take_logit_rows(o), ops.take_logit_rows(h)
        h = ops.matmul(o, layer.o_proj, add_to=h)
        gate_up = ops.matmul(ops.rms_norm(h, layer.post_attention_layernorm, eps), layer.gate_up_proj)
        h = ops.matmul(ops.silu_mul(gate_up), layer.down_proj, add_to=h)
    return ops.logits(ops.rms_norm(h, weights.norm, eps), weights.lm_head)
