"""4-bit blocks whose codes index a table of sixteen levels: nearest level, best scale, and the bytes of a block.

Owns the levels of Q4_0, IQ4_NL and NL4, and where the search for a scale tries to put the value of largest magnitude:
on an outermost level or a little beside it. Knows no files.
"""

import numpy as np
import numpy.typing as npt

from miniphi.checkpoint.formats import LEVELS, ByteArray, FloatArray, Format
from miniphi.checkpoint.scale_search import best_scales

__all__ = ["Codebook"]

# Where the tries put the value of largest magnitude, in levels. Measured on normal, Student-t and real weights; see
# docs/numerics.md for what they take off the error of the obvious scale and what more of them would.
_PEAK_LEVELS = {
    Format.Q4_0: (-8.0, -7.2, -7.6, -8.4, -8.8, 7.0, -6.8),
    Format.IQ4_NL: (-127.0, -117.0, -107.0, -137.0, 113.0, 103.0, 93.0, 121.0),
    Format.NL4: (-127.0, -117.0, -107.0, -137.0, 104.0, 95.0, 87.0, 113.0),
}
_HALF_RANGE = 256  # ratios of -128 to 127.5, in steps of a half


class Codebook:
    """The levels of one format."""

    def __init__(self, fmt: Format) -> None:
        self.format = fmt
        self.levels = np.array(LEVELS[fmt], dtype=np.float32)
        # Midpoints between whole levels are multiples of a half, so that every ratio inside [n/2, n/2 + 1/2) has the
        # same nearest level: rounding to levels is one look-up.
        borders = (self.levels[1:] + self.levels[:-1]) / 2
        steps = (np.arange(-_HALF_RANGE, _HALF_RANGE, dtype=np.float32) + np.float32(0.5)) / 2
        self._nearest_code = np.searchsorted(borders, steps).astype(np.uint8)
        self._nearest_level = self.levels[self._nearest_code]

    def nearest_codes(self, ratio: FloatArray) -> ByteArray:
        """Return the code of the level nearest to each value / scale, uint8; half way, the higher one."""
        return self._nearest_code[_half_steps(ratio)]

    def nearest_levels(self, ratio: FloatArray) -> FloatArray:
        """Return the level nearest to each value / scale; half way, the higher one."""
        return self._nearest_level[_half_steps(ratio)]

    def fit_scales(self, x: FloatArray, weight: FloatArray | None) -> npt.NDArray[np.float16]:
        """Return the scale of each block with the least weighted squared error, rounded to float16.

        Shapes: x and weight [blocks, block_size]; result [blocks].
        """
        low, high = x.min(axis=1), x.max(axis=1)
        peak = np.where(-low > high, low, high)
        scales = best_scales(x, weight, peak, levels=_PEAK_LEVELS[self.format], nearest=self.nearest_levels)
        return scales.astype("<f2")

    def encode(self, x: FloatArray, scales: npt.NDArray[np.float16]) -> ByteArray:
        """Return the code of every value under its block's scale, uint8 [blocks, block_size]."""
        wide = scales.astype(np.float32)
        inverse = np.where(wide == 0, np.float32(0), 1 / np.where(wide == 0, np.float32(1), wide))
        return self.nearest_codes(x * inverse[:, None])

    def decode(self, codes: ByteArray, scales: npt.NDArray[np.float16]) -> FloatArray:
        """Return the values that codes and scales stand for, float32 [blocks, block_size]."""
        values: FloatArray = self.levels[codes] * scales.astype(np.float32)[:, None]
        return values

    def pack(self, codes: ByteArray, scales: npt.NDArray[np.float16], out: ByteArray) -> None:
        """Write blocks: the scale, then value i in the low and value i + half a block in the high four bits."""
        half = codes.shape[1] // 2
        out[:, :2] = scales.astype("<f2", copy=False).view(np.uint8).reshape(-1, 2)
        out[:, 2:] = codes[:, :half] | (codes[:, half:] << np.uint8(4))


def _half_steps(ratio: FloatArray) -> npt.NDArray[np.int16]:
    """Return how many halves each ratio has, as an index into the tables; what is beyond them counts as their end."""
    halves = ratio + ratio
    np.floor(halves, out=halves)
    np.clip(halves, -_HALF_RANGE, _HALF_RANGE - 1, out=halves)
    steps = halves.astype(np.int16)
    steps += np.int16(_HALF_RANGE)
    return steps
