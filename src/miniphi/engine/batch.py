"""One step's worth of work for a program: `Batch`, and `BatchRunner`, what the engine needs to run one.

Owns the shapes that the engine and the program agree on. Knows neither scheduling nor arithmetic.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from miniphi.config import ModelConfig

__all__ = ["KV_BLOCK_SIZE", "Batch", "BatchRunner"]

KV_BLOCK_SIZE = 32
"""Tokens in one block of the paged key/value cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The tokens of one step, packed: S sequences, T tokens, R rows of logits.

    Sequence s brings the tokens `query_starts[s]:query_starts[s + 1]`, at consecutive positions that end at
    `context_lens[s] - 1`. Their keys and values are written into the cache before attention reads it; the key of
    position p lies in block `block_tables[s, p // KV_BLOCK_SIZE]`, slot `p % KV_BLOCK_SIZE`.
    """

    token_ids: NDArray[np.int32]
    """[T]"""
    positions: NDArray[np.int32]
    """[T], counted from 0 in each sequence"""
    query_starts: NDArray[np.int32]
    """[S + 1], ascending from 0 to T"""
    context_lens: NDArray[np.int32]
    """[S], tokens of the sequence in the cache once this step is done"""
    block_tables: NDArray[np.int32]
    """[S, B], physical block ids; a row is padded with 0"""
    use_long_factors: NDArray[np.bool_]
    """[S], which of LongRoPE's factor sets rotates this sequence; False where the model has none"""
    logit_rows: NDArray[np.int32]
    """[R], ascending indices into T of the tokens whose logits are wanted"""


class BatchRunner(Protocol):
    """What the engine needs from a program, so that tests can stand in for the model."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""

    @property
    def num_kv_blocks(self) -> int:
        """Blocks in the key/value cache."""

    @property
    def max_batch_tokens(self) -> int:
        """Largest T of a batch."""

    @property
    def max_logit_rows(self) -> int:
        """Largest R of a batch."""

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Run one step and return logits [R, vocab_size], which the caller may overwrite until the next run."""
