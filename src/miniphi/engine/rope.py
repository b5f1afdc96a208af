"""Rotary embedding tables: plain RoPE and LongRoPE's two factor sets.

    inv_freq[i] = 1 / (factor[i] * theta^(2i / rotary_dim))          factor = 1 without LongRoPE
    cos, sin    = (cos, sin)(position * inv_freq) * attention_factor

Angles are products of float32 numbers, as in the reference implementations: at position 100,000 a more exact product
would be a different model. Which set a sequence uses is decided elsewhere, once per sequence; here it is an argument.
Source: LongRoPE (arXiv 2402.13753) as in transformers' modeling_rope_utils.py.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miniphi.config import ModelConfig

__all__ = ["RopeTables"]

Floats = NDArray[np.float32]


@dataclass
class _Table:
    inv_freq: Floats
    attention_factor: np.float32
    cos: Floats
    sin: Floats

    def grow(self, length: int) -> None:
        """Make rows 0 .. length - 1 available; doubles, so that a long generation computes each row about once."""
        have = len(self.cos)
        if length <= have:
            return
        positions = np.arange(have, max(length, 2 * have, 1024), dtype=np.float32)
        angles = positions[:, None] * self.inv_freq[None, :]
        self.cos = np.concatenate([self.cos, np.cos(angles) * self.attention_factor])
        self.sin = np.concatenate([self.sin, np.sin(angles) * self.attention_factor])


class RopeTables:
    """cos and sin of a model, computed as far as positions have been asked for."""

    def __init__(self, config: ModelConfig) -> None:
        half = config.rotary_dim // 2
        exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
        base = (np.float64(config.rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
        scaling = config.rope_scaling
        ones = (1.0,) * half
        factor = np.float32(scaling.attention_factor if scaling else 1.0)
        empty = np.empty((0, half), np.float32)
        self._tables = tuple(
            _Table(np.float32(1) / (np.array(factors, np.float32) * base), factor, empty, empty)
            for factors in ((scaling.short_factor, scaling.long_factor) if scaling else (ones, ones))
        )

    def rows(self, positions: NDArray[np.int32], use_long: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """Return cos and sin, float32 [tokens, rotary_dim / 2]; `use_long` [tokens] picks the factor set."""
        length = int(positions.max()) + 1
        if use_long.all() or not use_long.any():
            table = self._tables[int(use_long[0])]
            table.grow(length)
            return table.cos[positions], table.sin[positions]
        for table in self._tables:
            table.grow(length)
        short, long = self._tables
        chosen = use_long[:, None]
        return (
            np.where(chosen, long.cos[positions], short.cos[positions]),
            np.where(chosen, long.sin[positions], short.sin[positions]),
        )
