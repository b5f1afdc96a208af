"""float32 -> Q8_0, Q4_0, Q4_1, IQ4_NL and NL4, with the least error a block allows.

Scales are searched for (scale_search.py), then rounded to float16, and the values are rounded once more, to what the
file will hold. The formats with a table of sixteen levels are codebook.py's. Knows no files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from miniphi.checkpoint.codebook import Codebook
from miniphi.checkpoint.formats import ByteArray, FloatArray, Format
from miniphi.checkpoint.scale_search import best_scales
from miniphi.errors import CheckpointError

__all__ = ["QUANTIZABLE", "QuantizationError", "quantize_rows"]

QUANTIZABLE = (Format.Q8_0, Format.Q4_0, Format.Q4_1, Format.IQ4_NL, Format.NL4)

_CHUNK_VALUES = 65_536  # all temporaries of a chunk stay in the second-level cache

# The obvious scale puts the value of largest magnitude on the outermost level; the tries put it a little beside that.
# Measured on normal, Student-t and real weights, these take 4 % (Q4_1: 9 %) off the error of the obvious scale; ten
# times as many tries would take off another 5 % of Q8_0's and 2 % of Q4_1's.
_Q8_0_LEVELS = (127.0, 126.6, 126.2, 125.8)
_Q4_1_LEVELS = (15.0, 14.5, 15.5, 14.0, 16.0)

_MAX_SCALE = float(np.finfo(np.float16).max)
_TINY = np.float32(1e-30)  # keeps 0 / 0 out of blocks of zeros

_CODEBOOKS = {fmt: Codebook(fmt) for fmt in (Format.Q4_0, Format.IQ4_NL, Format.NL4)}


@dataclass(frozen=True, kw_only=True)
class QuantizationError:
    """How far quantised values are from the originals: sums over all values, and the largest difference."""

    sum_squared_error: float = 0.0
    sum_squared_value: float = 0.0
    max_absolute: float = 0.0

    @property
    def relative(self) -> float:
        """Relative L2 error: sqrt(Sum (x - x')^2 / Sum x^2), not weighted by importance."""
        return (self.sum_squared_error / self.sum_squared_value) ** 0.5 if self.sum_squared_value else 0.0

    @classmethod
    def between(cls, values: FloatArray, stored: FloatArray) -> "QuantizationError":
        """Compare values with what became of them, both [rows, columns]."""
        difference = stored - values
        return cls(
            sum_squared_error=_sum_of_squares(difference),
            sum_squared_value=_sum_of_squares(values),
            max_absolute=float(max(difference.max(), -difference.min())),
        )

    def __add__(self, other: "QuantizationError") -> "QuantizationError":
        return QuantizationError(
            sum_squared_error=self.sum_squared_error + other.sum_squared_error,
            sum_squared_value=self.sum_squared_value + other.sum_squared_value,
            max_absolute=max(self.max_absolute, other.max_absolute),
        )


def quantize_rows(
    values: FloatArray, fmt: Format, *, importance: FloatArray | None = None
) -> tuple[ByteArray, QuantizationError]:
    """Quantise rows to one of the formats of QUANTIZABLE.

    Shapes: values [rows, columns]; importance [columns] (relative weight of a column's squared error; None: all the
    same); result uint8 [rows, row_bytes].
    Raises CheckpointError if a value is not finite or too large for a float16 scale, ValueError if the number of
    columns is not a multiple of the block size or the format is not one of them.
    """
    if fmt not in QUANTIZABLE:
        raise ValueError(f"expected one of {', '.join(each.name for each in QUANTIZABLE)}, found {fmt.name}")
    num_rows, num_columns = values.shape
    raw = np.empty((num_rows, fmt.row_bytes(num_columns)), dtype=np.uint8)
    blocks = raw.reshape(-1, fmt.block_bytes)
    x = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, fmt.block_size)
    weights = None if importance is None else _block_weights(importance, num_rows, num_columns, fmt)
    error = QuantizationError()
    step = _CHUNK_VALUES // fmt.block_size
    for start in range(0, len(x), step):
        weight = None if weights is None else weights[start : start + step]
        error += _quantize_chunk(x[start : start + step], weight, fmt, blocks[start : start + step])
    return raw, error


def _block_weights(importance: FloatArray, num_rows: int, num_columns: int, fmt: Format) -> FloatArray:
    if importance.shape != (num_columns,) or not np.all(np.isfinite(importance)) or not np.all(importance > 0):
        raise CheckpointError(f"importance: expected {num_columns} positive numbers, one for each column")
    blocks = importance.astype(np.float32).reshape(-1, fmt.block_size)
    return np.broadcast_to(blocks, (num_rows, *blocks.shape)).reshape(-1, fmt.block_size)


def _quantize_chunk(x: FloatArray, weight: FloatArray | None, fmt: Format, out: ByteArray) -> QuantizationError:
    largest = float(max(x.max(), -x.min()))
    if not largest < _MAX_SCALE:  # also true for NaN
        raise CheckpointError(f"a value is {largest}; {fmt.name} holds finite values below {_MAX_SCALE:.0f}")
    if fmt in _CODEBOOKS:
        stored = _encode_levels(x, weight, out, _CODEBOOKS[fmt])
    else:
        stored = (_encode_q8_0 if fmt is Format.Q8_0 else _encode_q4_1)(x, weight, out)
    return QuantizationError.between(x, stored)


def _sum_of_squares(x: FloatArray) -> float:
    # Per block in float32, over blocks in float64: exact enough for any number of values.
    return float(np.einsum("bi,bi->b", x, x).sum(dtype=np.float64))


def _encode_q8_0(x: FloatArray, weight: FloatArray | None, out: ByteArray) -> FloatArray:
    peak = np.abs(x).max(axis=1)
    scale = best_scales(x, weight, peak, levels=_Q8_0_LEVELS, nearest=_rounding(-127, 127))
    stored, q = _round_to_stored(x, scale, -127, 127)
    out[:, :2] = stored.view(np.uint8).reshape(-1, 2)
    out[:, 2:] = q.astype(np.int8).view(np.uint8)
    return q * stored.astype(np.float32)[:, None]


def _encode_levels(x: FloatArray, weight: FloatArray | None, out: ByteArray, book: Codebook) -> FloatArray:
    scales = book.fit_scales(x, weight)
    codes = book.encode(x, scales)
    book.pack(codes, scales, out)
    return book.decode(codes, scales)


def _rounding(low: int, high: int) -> Callable[[FloatArray], FloatArray]:
    """Return what rounds to whole numbers within bounds, in place."""

    def nearest(ratio: FloatArray) -> FloatArray:
        np.rint(ratio, out=ratio)
        return np.clip(ratio, low, high, out=ratio)

    return nearest


def _round_to_stored(
    x: FloatArray, scale: FloatArray, low: int, high: int
) -> tuple[npt.NDArray[np.float16], FloatArray]:
    """Round the scale to float16, then the values to the nearest multiples of it: scales [blocks], q [blocks, 32]."""
    stored = scale.astype("<f2")
    wide = stored.astype(np.float32)
    inverse = np.where(wide == 0, np.float32(0), 1 / np.where(wide == 0, np.float32(1), wide))
    q = np.multiply(x, inverse[:, None])
    np.rint(q, out=q)
    return stored, np.clip(q, low, high, out=q)


def _encode_q4_1(x: FloatArray, weight: FloatArray | None, out: ByteArray) -> FloatArray:
    low = x.min(axis=1, keepdims=True)
    spread = np.maximum(x.max(axis=1, keepdims=True) - low, _TINY)
    best_error = np.full((len(x), 1), np.inf, dtype=np.float32)
    best_scale, best_minimum = spread / 15, low
    ones = np.ones_like(x) if weight is None else weight
    for level in _Q4_1_LEVELS:
        q = np.clip(np.rint((x - low) * (np.float32(level) / spread)), 0, 15)
        scale, minimum = _fit_line(x, q, ones)
        q = np.clip(np.rint((x - minimum) / np.maximum(scale, _TINY)), 0, 15)
        error = np.einsum("bi,bi,bi->b", ones, *[q * scale + minimum - x] * 2)[:, None]
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_minimum = np.where(better, minimum, best_minimum)
    offset = best_minimum.astype("<f2")
    stored, q = _round_to_stored(x - offset.astype(np.float32), best_scale[:, 0], 0, 15)
    out[:, :2] = stored.view(np.uint8).reshape(-1, 2)
    out[:, 2:4] = offset.view(np.uint8).reshape(-1, 2)
    out[:, 4:] = _pack_nibbles(q.astype(np.uint8))
    values: FloatArray = q * stored.astype(np.float32)[:, None] + offset.astype(np.float32)
    return values


def _fit_line(x: FloatArray, q: FloatArray, w: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Weighted least squares x = scale * q + minimum for each block; a flat block keeps scale 0."""
    total = w.sum(axis=1, keepdims=True)
    mean_x = (w * x).sum(axis=1, keepdims=True) / total
    mean_q = (w * q).sum(axis=1, keepdims=True) / total
    centred = q - mean_q
    variance = (w * centred * centred).sum(axis=1, keepdims=True)
    scale = np.maximum((w * centred * x).sum(axis=1, keepdims=True) / np.maximum(variance, _TINY), 0)
    return scale, mean_x - scale * mean_q


def _pack_nibbles(q: ByteArray) -> ByteArray:
    """Pack values 0..15 of a block into the low bits of 16 bytes, 16..31 into the high bits."""
    return q[:, :16] | (q[:, 16:] << np.uint8(4))
