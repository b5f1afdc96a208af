"""Storage formats of weights: how many bytes a block has, where its fields are, and what its values are.

All formats are little-endian. A row of a tensor is a whole number of blocks. Values are bit-exact with the
`gguf` package (float32 arithmetic in the same order). Knows nothing about files, names or models.

Legend for the layouts: `d`, `m` are float16 scale and minimum; `lo`/`hi` are the low and high four bits of a byte;
q is an unsigned integer unless said otherwise; x is the value.
"""

from collections.abc import Callable
from enum import Enum

import numpy as np
import numpy.typing as npt

__all__ = ["LEVELS", "Format", "dequantize", "format_from_ggml_type"]

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

_CHUNK_VALUES = 1 << 18  # 1 MiB of float32: temporaries stay in the cache and do not grow with the tensor


class Format(Enum):
    """A storage format: ggml type id (None where GGUF has no such type), values per block, bytes per block."""

    F32 = (0, 1, 4)  # x: float32
    F16 = (1, 1, 2)  # x: float16
    BF16 = (30, 1, 2)  # x: upper half of a float32
    Q8_0 = (8, 32, 34)  # d[2] q[32] int8;                              x = q * d
    Q4_0 = (2, 32, 18)  # d[2] q[16]: lo = values 0..15, hi = 16..31;   x = (q - 8) * d
    Q4_1 = (3, 32, 20)  # d[2] m[2] q[16] as Q4_0;                      x = q * d + m
    Q5_0 = (6, 32, 22)  # d[2] h[4] q[16]: bit i of h is bit 4 of q[i]; x = (q - 16) * d
    Q5_1 = (7, 32, 24)  # d[2] m[2] h[4] q[16];                         x = q * d + m
    Q4_K = (12, 256, 144)  # d[2] m[2] s[12] q[128]: 8 parts of 32;     x = q * (d * scale) - m * minimum
    Q5_K = (13, 256, 176)  # d[2] m[2] s[12] h[32] q[128]: bit p of h belongs to part p; x as Q4_K
    Q6_K = (14, 256, 210)  # q[128] h[64] scale[16] int8 d[2]: 16 parts of 16;           x = (q - 32) * (d * scale)
    IQ4_NL = (20, 32, 18)  # d[2] q[16] as Q4_0;                        x = level[q] * d
    NL4 = (None, 64, 34)  # d[2] q[32]: lo = values 0..31, hi = 32..63; x = level[q] * d

    def __init__(self, ggml_type: int | None, block_size: int, block_bytes: int) -> None:
        self.ggml_type = ggml_type
        self.block_size = block_size
        self.block_bytes = block_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits that one value takes, scales included."""
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, num_columns: int) -> int:
        """Bytes of one row of `num_columns` values, which must be a multiple of the block size (else ValueError)."""
        num_blocks, rest = divmod(num_columns, self.block_size)
        if rest:
            raise ValueError(f"{self.name} needs a multiple of {self.block_size} columns, found {num_columns}")
        return num_blocks * self.block_bytes


_BY_GGML_TYPE = {fmt.ggml_type: fmt for fmt in Format if fmt.ggml_type is not None}

LEVELS: dict[Format, tuple[int, ...]] = {
    Format.Q4_0: tuple(range(-8, 8)),
    Format.IQ4_NL: (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    Format.NL4: (-127, -97, -75, -58, -44, -31, -19, -8, 2, 12, 23, 34, 47, 62, 80, 104),
}
"""What the sixteen codes of a 4-bit format stand for, in multiples of the block's scale.

IQ4_NL's are ggml's (`kvalues_iq4nl` in ggml-common.h). NL4's are the fixed point of Lloyd's algorithm on blocks of 64
trained weights, both rounded by themselves and with error feedback; docs/numerics.md says what they gain.
"""


def format_from_ggml_type(ggml_type: int) -> Format | None:
    """Return the format with this ggml type id, or None if miniphi does not read it."""
    return _BY_GGML_TYPE.get(ggml_type)


def dequantize(raw: ByteArray, fmt: Format, *, row_order: npt.NDArray[np.int32] | None = None) -> FloatArray:
    """Return the float32 values of `raw`.

    Shapes: raw [rows, row_bytes]; row_order [rows] (row i of the result is raw row `row_order[i]`) or None;
    result [rows, row_bytes / block_bytes * block_size].
    """
    num_rows, row_bytes = raw.shape
    num_columns = row_bytes // fmt.block_bytes * fmt.block_size
    values = np.empty((num_rows, num_columns), dtype=np.float32)
    rows_per_chunk = max(1, _CHUNK_VALUES // max(1, num_columns))
    decode = _DECODERS[fmt]
    # A scale that is infinite or NaN is data here, not a mistake of ours.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, num_rows, rows_per_chunk):
            stop = min(start + rows_per_chunk, num_rows)
            chunk = raw[start:stop] if row_order is None else raw[row_order[start:stop]]
            blocks = np.ascontiguousarray(chunk).reshape(-1, fmt.block_bytes)
            values[start:stop] = decode(blocks).reshape(stop - start, num_columns)
    return values


def _float16(blocks: ByteArray, offset: int) -> FloatArray:
    """Column of float16 fields at a byte offset, as float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: ByteArray) -> ByteArray:
    """Low then high four bits: [blocks, n] -> [blocks, 2n]."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)


def _fifth_bits(packed: ByteArray) -> ByteArray:
    """Bit i of a 32-bit field, as 0 or 16: [blocks, 4] -> [blocks, 32]."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _decode_f32(blocks: ByteArray) -> FloatArray:
    return blocks.view("<f4").astype(np.float32, copy=False)


def _decode_f16(blocks: ByteArray) -> FloatArray:
    return blocks.view("<f2").astype(np.float32)


def _decode_bf16(blocks: ByteArray) -> FloatArray:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _decode_q8_0(blocks: ByteArray) -> FloatArray:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _float16(blocks, 0)


def _decode_q4_0(blocks: ByteArray) -> FloatArray:
    q = _nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8)
    return q.astype(np.float32) * _float16(blocks, 0)


def _decode_levels(fmt: Format) -> Callable[[ByteArray], FloatArray]:
    levels = np.array(LEVELS[fmt], dtype=np.float32)

    def decode(blocks: ByteArray) -> FloatArray:
        return levels[_nibbles(blocks[:, 2:])] * _float16(blocks, 0)

    return decode


def _decode_q4_1(blocks: ByteArray) -> FloatArray:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _float16(blocks, 0) + _float16(blocks, 2)


def _decode_q5_0(blocks: ByteArray) -> FloatArray:
    q = (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).astype(np.int8) - np.int8(16)
    return q.astype(np.float32) * _float16(blocks, 0)


def _decode_q5_1(blocks: ByteArray) -> FloatArray:
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return q.astype(np.float32) * _float16(blocks, 0) + _float16(blocks, 2)


def _k_scales(blocks: ByteArray) -> tuple[FloatArray, FloatArray]:
    """Scales and minima of the eight parts of a Q4_K or Q5_K block, each float32 [blocks, 8, 1].

    The 12 bytes hold eight 6-bit scales and eight 6-bit minima: bytes 0..3 and 4..7 have numbers 0..3 in their low
    six bits and the top two bits of numbers 4..7 above them; bytes 8..11 have the low four bits of numbers 4..7.
    """
    first, second, third = (blocks[:, start : start + 4] for start in (4, 8, 12))
    six, four, two = np.uint8(0x3F), np.uint8(0x0F), np.uint8(0x30)
    scales = np.concatenate([first & six, (third & four) | ((first >> np.uint8(2)) & two)], axis=1)
    minima = np.concatenate([second & six, (third >> np.uint8(4)) | ((second >> np.uint8(2)) & two)], axis=1)
    d = _float16(blocks, 0) * scales.astype(np.float32)
    m = _float16(blocks, 2) * minima.astype(np.float32)
    return d[:, :, None], m[:, :, None]


def _k_nibbles(packed: ByteArray) -> ByteArray:
    """Each 32 bytes hold two parts, low then high bits: [blocks, 128] -> [blocks, 8, 32]."""
    groups = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([groups & np.uint8(15), groups >> np.uint8(4)], axis=2).reshape(-1, 8, 32)


def _decode_q4_k(blocks: ByteArray) -> FloatArray:
    d, m = _k_scales(blocks)
    return _k_nibbles(blocks[:, 16:]).astype(np.float32) * d - m


def _decode_q5_k(blocks: ByteArray) -> FloatArray:
    d, m = _k_scales(blocks)
    parts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    high = (blocks[:, None, 16:48] >> parts) & np.uint8(1)
    q = _k_nibbles(blocks[:, 48:]) | (high << np.uint8(4))
    return q.astype(np.float32) * d - m


def _decode_q6_k(blocks: ByteArray) -> FloatArray:
    groups = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([groups & np.uint8(15), groups >> np.uint8(4)], axis=2).reshape(-1, 8, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)).reshape(-1, 8, 32)
    q = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    scales = _float16(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    values: FloatArray = q.reshape(-1, 16, 16).astype(np.float32) * scales[:, :, None]
    return values


_DECODERS: dict[Format, Callable[[ByteArray], FloatArray]] = {
    Format.F32: _decode_f32,
    Format.F16: _decode_f16,
    Format.BF16: _decode_bf16,
    Format.Q8_0: _decode_q8_0,
    Format.Q4_0: _decode_q4_0,
    Format.Q4_1: _decode_q4_1,
    Format.Q5_0: _decode_q5_0,
    Format.Q5_1: _decode_q5_1,
    Format.Q4_K: _decode_q4_k,
    Format.Q5_K: _decode_q5_k,
    Format.Q6_K: _decode_q6_k,
    Format.IQ4_NL: _decode_levels(Format.IQ4_NL),
    Format.NL4: _decode_levels(Format.NL4),
}
