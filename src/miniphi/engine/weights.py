"""From a checkpoint's tensors to packed matrices, under the names the model function uses.

Packing keeps every value exactly; each tensor's file pages are let go once it is packed, so that a model never lies in
memory twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miniphi.checkpoint import StoredTensor
from miniphi.config import ModelConfig
from miniphi.kernels import Kind, PackedMatrix, Packer

__all__ = ["LayerWeights", "ModelWeights", "pack_weights"]

Matrices = tuple[PackedMatrix, ...]
"""Matrices whose outputs lie side by side: a fused projection is one, split q, k and v are three."""


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One transformer block."""

    input_layernorm: NDArray[np.float32]
    qkv_proj: Matrices
    o_proj: Matrices
    post_attention_layernorm: NDArray[np.float32]
    gate_up_proj: Matrices
    down_proj: Matrices

    @property
    def matrices(self) -> Matrices:
        """All matrices, in the order of use."""
        return (*self.qkv_proj, *self.o_proj, *self.gate_up_proj, *self.down_proj)


@dataclass(frozen=True, kw_only=True)
class ModelWeights:
    """A whole model."""

    embed_tokens: PackedMatrix
    layers: tuple[LayerWeights, ...]
    norm: NDArray[np.float32]
    lm_head: Matrices

    @property
    def num_bytes(self) -> int:
        """Bytes of all packed matrices; tied embeddings count once."""
        matrices = {id(m): m for m in (self.embed_tokens, *self.lm_head)}
        for layer in self.layers:
            for matrix in layer.matrices:
                matrices[id(matrix)] = matrix
        return sum(matrix.num_bytes for matrix in matrices.values())


def pack_weights(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    *,
    num_threads: int,
    on_progress: Callable[[int], None] | None = None,
) -> ModelWeights:
    """Pack every tensor of a checkpoint. `on_progress` gets the stored bytes of each tensor as it is done."""
    packer = Packer(num_threads)

    def matrix(name: str) -> PackedMatrix:
        tensor = tensors[name]
        packed = packer.pack(Kind[tensor.format.name], tensor.raw, tensor.shape[1], tensor.row_order)
        tensor.release_pages()
        if on_progress:
            on_progress(tensor.num_bytes)
        return packed

    def vector(name: str) -> NDArray[np.float32]:
        return tensors[name].to_float32()

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        fused = config.model_type == "phi3"
        qkv = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
        gate_up = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
        return LayerWeights(
            input_layernorm=vector(prefix + "input_layernorm.weight"),
            qkv_proj=tuple(matrix(f"{prefix}self_attn.{name}.weight") for name in qkv),
            o_proj=(matrix(prefix + "self_attn.o_proj.weight"),),
            post_attention_layernorm=vector(prefix + "post_attention_layernorm.weight"),
            gate_up_proj=tuple(matrix(f"{prefix}mlp.{name}.weight") for name in gate_up),
            down_proj=(matrix(prefix + "mlp.down_proj.weight"),),
        )

    embed_tokens = matrix("model.embed_tokens.weight")
    return ModelWeights(
        embed_tokens=embed_tokens,
        layers=tuple(layer(index) for index in range(config.num_hidden_layers)),
        norm=vector("model.norm.weight"),
        lm_head=(matrix("lm_head.weight"),) if "lm_head.weight" in tensors else (embed_tokens,),
    )
