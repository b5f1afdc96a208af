"""The scale of each block with the least weighted squared error.

For each block of values several scales around the obvious one are tried: the values are rounded to what the format can
hold, v, the scale that fits these best is Sum(w x v) / Sum(w v v) (least squares, weights w), and the try with the
least error wins. Knows no format.
"""

from collections.abc import Callable, Sequence

import numpy as np

from miniphi.checkpoint.formats import FloatArray

__all__ = ["best_scales"]

_TINY = np.float32(1e-30)  # keeps 0 / 0 out of blocks of zeros


def best_scales(
    x: FloatArray,
    weight: FloatArray | None,
    peak: FloatArray,
    *,
    levels: Sequence[float],
    nearest: Callable[[FloatArray], FloatArray],
) -> FloatArray:
    """Return the best of the scales that put the value `peak` of its block on one of `levels`, refitted; [blocks].

    Shapes: x and weight [blocks, block_size], peak [blocks]. `nearest` rounds values / scale to what a block can hold
    and may do so in place. For given v the error is Sum(w x x) - Sum(w x v)^2 / Sum(w v v), so the largest last term
    wins. A block of zeros gets the scale 0.
    """
    weighted = x if weight is None else x * weight
    is_zero = np.abs(peak) < _TINY
    safe_peak = np.where(is_zero, np.float32(1), peak)
    best_gain = np.full(len(x), -1, dtype=np.float32)
    best_scale = np.zeros(len(x), dtype=np.float32)
    ratio = np.empty_like(x)
    for level in levels:
        np.multiply(x, (np.float32(level) / safe_peak)[:, None], out=ratio)
        v = nearest(ratio)
        xv = np.einsum("bi,bi->b", weighted, v)
        vv = np.einsum("bi,bi->b", v, v) if weight is None else np.einsum("bi,bi,bi->b", weight, v, v)
        scale = xv / np.maximum(vv, _TINY)
        gain = xv * scale
        better = gain > best_gain
        best_gain[better] = gain[better]
        best_scale[better] = scale[better]
    return np.where(is_zero, np.float32(0), best_scale)
