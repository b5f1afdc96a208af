"""Every operation in NumPy: what the native kernels are checked against.

Plain float32 arithmetic in the order a textbook has it; `quantized_matmul` also rounds activations to int8 as the
kernels do, so that it shows their error apart from the format's. Knows no model.
"""

import numpy as np
from numpy.typing import NDArray

from miniphi.kernels import Kind, PackedMatrix

__all__ = [
    "attention",
    "matmul",
    "packed_matmul",
    "quantize_rows",
    "quantized_matmul",
    "rms_norm",
    "rotate",
    "silu_mul",
]

Floats = NDArray[np.float32]
GROUP = 32
"""Values that share one activation scale; csrc/blocks.h::kGroup."""


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Return x / sqrt(mean(x^2) + eps) * weight, row by row."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
    return np.asarray(x / np.sqrt(mean_square + np.float32(eps)) * weight, np.float32)


def silu_mul(gate_up: Floats) -> Floats:
    """Return up * gate * sigmoid(gate) for rows [gate | up]."""
    gate, up = np.split(gate_up, 2, axis=-1)
    with np.errstate(over="ignore"):
        return np.asarray(up * (gate / (1 + np.exp(-gate))), np.float32)


def rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotate the first 2 * half dimensions of heads: x [tokens, heads, head_dim], cos and sin [tokens, half]."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def attention(query: Floats, keys: Floats, values: Floats, positions: NDArray[np.int32], window: int | None) -> Floats:
    """Return causal attention of one sequence.

    Shapes: query [tokens, heads, head_dim] at `positions` [tokens]; keys and values [context, kv_heads, head_dim].
    A query sees keys at distance 0 <= d < window.
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    scores = np.einsum("thd,chd->htc", query, keys) * np.float32(query.shape[-1] ** -0.5)
    distance = positions[:, None] - np.arange(len(keys))[None, :]
    visible = (distance >= 0) & (distance < (window or len(keys) + 1))
    scores = np.where(visible[None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    output: Floats = np.einsum("htc,chd->thd", weights, values)
    return output


def quantize_rows(x: Floats, group: int = GROUP) -> tuple[NDArray[np.int8], Floats]:
    """Return int8 codes and one scale for each group of a row: x is about codes * scale, scale = max|x| / 127."""
    groups = x.reshape(*x.shape[:-1], -1, group)
    top = np.abs(groups).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    codes = np.rint(groups * inverse).astype(np.int8)
    return codes.reshape(x.shape), (top / np.float32(127))[..., 0]


def matmul(x: Floats, weight: Floats) -> Floats:
    """Return x weight^T in float32."""
    return x @ weight.T


def quantized_matmul(x: Floats, weight: Floats, *, fine: bool = False) -> Floats:
    """Return x weight^T with x rounded to int8 in groups of 32, as every quantised kernel does.

    `fine` adds a second plane of codes for what the first left over.
    """
    rounded = np.zeros_like(x)
    for _ in range(2 if fine else 1):
        codes, scale = quantize_rows(x - rounded)
        rounded += codes * np.repeat(scale, GROUP, axis=-1)
    return rounded @ weight.T


def packed_matmul(x: Floats, matrix: PackedMatrix, *, fine: bool = False) -> Floats:
    """Return what the native matmul computes, with the rounding that belongs to the matrix's format."""
    if not Kind(matrix.kind).is_quantized:
        return matmul(x, matrix.unpack())
    return quantized_matmul(x, matrix.unpack(), fine=fine)
