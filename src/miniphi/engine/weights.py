"""A model's weights as the kernels read them, under the names the model function uses, and the way there.

Packing keeps every value exactly; each tensor's file pages are let go once it is packed, so that a model never lies in
memory twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from miniphi.config import ModelConfig
from miniphi.kernels import Kind, PackedMatrix, Packer

if TYPE_CHECKING:
    from miniphi.checkpoint import StoredTensor

__all__ = ["LayerWeights", "ModelWeights", "assemble", "pack_weights"]

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
    """A whole model; `matrices` and `vectors` are the same by the checkpoint's names, in the order of use."""

    embed_tokens: PackedMatrix
    layers: tuple[LayerWeights, ...]
    norm: NDArray[np.float32]
    lm_head: Matrices
    matrices: Mapping[str, PackedMatrix]
    vectors: Mapping[str, NDArray[np.float32]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all packed matrices; tied embeddings count once."""
        return sum(matrix.num_bytes for matrix in self.matrices.values())


def assemble(
    config: ModelConfig, matrix: Callable[[str], PackedMatrix], vector: Callable[[str], NDArray[np.float32]]
) -> ModelWeights:
    """Ask for every tensor of a model once, in the order of use, and put them together."""
    matrices: dict[str, PackedMatrix] = {}
    vectors: dict[str, NDArray[np.float32]] = {}

    def take_matrix(name: str) -> PackedMatrix:
        full_name = name + ".weight"
        matrices[full_name] = matrix(full_name)
        return matrices[full_name]

    def take_vector(name: str) -> NDArray[np.float32]:
        full_name = name + ".weight"
        vectors[full_name] = vector(full_name)
        return vectors[full_name]

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        fused = config.model_type == "phi3"
        qkv = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
        gate_up = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
        return LayerWeights(
            input_layernorm=take_vector(prefix + "input_layernorm"),
            qkv_proj=tuple(take_matrix(f"{prefix}self_attn.{name}") for name in qkv),
            o_proj=(take_matrix(prefix + "self_attn.o_proj"),),
            post_attention_layernorm=take_vector(prefix + "post_attention_layernorm"),
            gate_up_proj=tuple(take_matrix(f"{prefix}mlp.{name}") for name in gate_up),
            down_proj=(take_matrix(prefix + "mlp.down_proj"),),
        )

    embed_tokens = take_matrix("model.embed_tokens")
    return ModelWeights(
        embed_tokens=embed_tokens,
        layers=tuple(layer(index) for index in range(config.num_hidden_layers)),
        norm=take_vector("model.norm"),
        lm_head=(embed_tokens,) if config.tie_word_embeddings else (take_matrix("lm_head"),),
        matrices=matrices,
        vectors=vectors,
    )


def pack_weights(
    config: ModelConfig,
    tensors: "Mapping[str, StoredTensor]",
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

    return assemble(config, matrix, lambda name: tensors[name].to_float32())
