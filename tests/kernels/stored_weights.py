"""Random rows in every storage format, with scales of a plausible size."""

import numpy as np
from numpy.typing import NDArray

from miniphi.checkpoint.formats import Format, dequantize

_HALVES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q5_0": (0,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "NL4": (0,),
}


def random_rows(fmt: Format, rows: int, depth: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return stored rows [rows, row_bytes] and their values [rows, depth]."""
    rng = np.random.default_rng(seed)
    if fmt.name not in _HALVES:
        values = rng.standard_normal((rows, depth)).astype(np.float32)
        stored = {
            "F32": lambda: values,
            "F16": lambda: values.astype(np.float16),
            "BF16": lambda: (values.view(np.uint32) >> 16).astype(np.uint16),
        }[fmt.name]()
        raw = np.ascontiguousarray(stored).view(np.uint8)
        return raw, dequantize(raw, fmt)
    blocks = rng.integers(0, 256, (rows, depth // fmt.block_size, fmt.block_bytes), dtype=np.uint8)
    for offset in _HALVES[fmt.name]:
        halves = rng.uniform(0.001, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, offset : offset + 2] = halves.view(np.uint8).reshape(*blocks.shape[:2], 2)
    raw = blocks.reshape(rows, -1)
    return raw, dequantize(raw, fmt)
