"""Every operation in NumPy: what the native kernels are checked against.

Plain float32 arithmetic in the order a textbook has it; `quantized_matmul` also rounds activations to int8 as the
kernels do, so that it shows their error apart from the format's. Knows no model.
"""

import numpy as np
from numpy.typing import NDArray

from miniphi.kernels import CacheType, Kind, PackedMatrix

__all__ = [
    "NON_LINEAR",
    "attention",
    "matmul",
    "packed_matmul",
    "quantize_rows",
    "quantized_matmul",
    "rms_norm",
    "rotate",
    "round_keys",
    "round_queries",
    "round_values",
    "silu_mul",
]

Floats = NDArray[np.float32]
GROUP = 32
"""Values that share one activation scale; csrc/blocks.h::kGroup."""

WIDE_GROUP = 64
"""Groups of so many have scales that are their row's, times powers of two; csrc/blocks.h::kWideGroup."""

MAX_EXPONENT = 30
"""The largest of these powers; csrc/blocks.h::kMaxExponent."""

NON_LINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""What the codes of IQ4_NL and of a 4-bit cache's values stand for; csrc/blocks.h::kLevelsIQ4NL."""

FIVE_BITS = np.arange(-16, 16, dtype=np.float32)

HADAMARD = np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(GROUP)] for i in range(GROUP)], np.float32)
HADAMARD /= np.sqrt(np.float32(GROUP))


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
    """Return int8 codes and one scale for each group of a row: x is about codes * scale.

    127 * scale is max|x| of the group; in wide groups max|x| of the row, halved as often as leaves it at or above that.
    """
    groups = x.reshape(*x.shape[:-1], -1, group)
    top = np.abs(groups).max(axis=-1, keepdims=True)
    if group == WIDE_GROUP:
        highest = top.max(axis=-2, keepdims=True)
        ratio = np.divide(highest, top, out=np.full_like(top, 2.0**MAX_EXPONENT), where=top > 0)
        top = np.ldexp(highest, -np.minimum(np.frexp(ratio)[1] - 1, MAX_EXPONENT))
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    codes = np.rint(groups * inverse).astype(np.int8)
    return codes.reshape(x.shape), (top / np.float32(127))[..., 0]


def round_keys(x: Floats, cache_type: CacheType) -> Floats:
    """Return what the cache makes of keys [..., head_dim]: int8 or 5 bits of the rotated keys, in groups of 32."""
    if cache_type is CacheType.Q8:
        return _int8(x, GROUP)
    if cache_type is CacheType.Q4:
        return _rotate_groups(_fitted(_rotate_groups(_padded(x, GROUP)), GROUP, FIVE_BITS))[..., : x.shape[-1]]
    return _half(x, cache_type)


def round_values(x: Floats, cache_type: CacheType) -> Floats:
    """Return what the cache makes of values [..., head_dim]: int8 or non-linear codes, with one scale."""
    if cache_type is CacheType.Q8:
        return _int8(x, x.shape[-1])
    if cache_type is CacheType.Q4:
        rotated = _rotate_groups(_padded(x, GROUP))
        return _rotate_groups(_fitted(rotated, rotated.shape[-1], NON_LINEAR))[..., : x.shape[-1]]
    return _half(x, cache_type)


def round_queries(x: Floats, cache_type: CacheType) -> Floats:
    """Return what attention over such a cache makes of queries [..., head_dim]: int8 where the cache is quantised."""
    if cache_type is CacheType.Q4:
        return _rotate_groups(_int8(_rotate_groups(_padded(x, GROUP)), GROUP))[..., : x.shape[-1]]
    return _int8(x, GROUP) if cache_type is CacheType.Q8 else x


def _half(x: Floats, cache_type: CacheType) -> Floats:
    return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32) if cache_type is CacheType.F16 else x


def _padded(x: Floats, group: int) -> Floats:
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % group)])


def _int8(x: Floats, group: int) -> Floats:
    codes, scale = quantize_rows(_padded(x, group), group)
    rounded = codes * np.repeat(scale.astype(np.float16).astype(np.float32), group, axis=-1)
    return np.asarray(rounded[..., : x.shape[-1]])


def _rotate_groups(x: Floats) -> Floats:
    return np.asarray((x.reshape(*x.shape[:-1], -1, GROUP) @ HADAMARD).reshape(x.shape))


def _fitted(x: Floats, group: int, table: Floats) -> Floats:
    """Round groups to a table of whole numbers, the value that stands out to an outermost one, with the best scale."""
    groups = x.reshape(*x.shape[:-1], -1, group)
    top = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
    outermost = np.where(top > 0, table[-1], table[0]) if table is NON_LINEAR else np.full_like(top, table[0])
    whole = np.rint(groups * np.divide(outermost, top, out=np.zeros_like(top), where=top != 0))
    codes = table[np.abs(whole[..., None] - table).argmin(axis=-1)]
    square = np.square(codes).sum(axis=-1, keepdims=True)
    scale = np.divide((groups * codes).sum(axis=-1, keepdims=True), square, out=np.zeros_like(top), where=square > 0)
    return np.asarray((codes * scale.astype(np.float16).astype(np.float32)).reshape(x.shape))


def matmul(x: Floats, weight: Floats) -> Floats:
    """Return x weight^T in float32."""
    return x @ weight.T


def quantized_matmul(x: Floats, weight: Floats, *, group: int = GROUP, fine: bool = False) -> Floats:
    """Return x weight^T with x rounded to int8 in groups, as every quantised kernel does.

    `fine` adds a second plane of codes for what the first left over.
    """
    rounded = np.zeros_like(x)
    for _ in range(2 if fine else 1):
        codes, scale = quantize_rows(x - rounded, group)
        rounded += codes * np.repeat(scale, group, axis=-1)
    return rounded @ weight.T


def packed_matmul(x: Floats, matrix: PackedMatrix, *, fine: bool = False) -> Floats:
    """Return what the native matmul computes, with the rounding that belongs to the matrix's format."""
    if not Kind(matrix.kind).is_quantized:
        return matmul(x, matrix.unpack())
    return quantized_matmul(x, matrix.unpack(), group=Kind(matrix.kind).activation_group, fine=fine)
