"""Fakes for testing what stands on the engine without a model.

`FakeProgram` honours the whole contract of a program, paged cache included, and refuses what breaks it. Knows no
weights: its logits are a hash of the tokens that the step's block tables lead to.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from miniphi.config import ModelConfig, RopeScaling
from miniphi.engine.batch import KV_BLOCK_SIZE, Batch

__all__ = ["FakeProgram", "fake_config"]

_EMPTY = -1
_GOLDEN = 0x9E3779B97F4A7C15
"""Step of splitmix64 (Steele, Lea and Flood 2014)."""
_LOGIT_RANGE = 16.0


def fake_config(
    *, vocab_size: int = 64, max_position_embeddings: int = 4096, original_context: int | None = None
) -> ModelConfig:
    """Return the configuration of a tiny Phi-3, with LongRoPE if `original_context` is given."""
    scaling = None
    if original_context is not None:
        scaling = RopeScaling(
            long_factor=(2.0,) * 4,
            short_factor=(1.0,) * 4,
            original_max_position_embeddings=original_context,
            attention_factor=1.0,
        )
    return ModelConfig(
        model_type="phi3",
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        partial_rotary_factor=1.0,
        rope_scaling=scaling,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_ids=(0,),
        pad_token_id=None,
    )


class FakeProgram:
    """A deterministic stand-in for a program: pure NumPy, instant, and strict about its batches.

    Every slot of the cache remembers the token, the position and the factor set it was written with. Logits come from
    what the block table leads to, so a wrong table, a stale block or a mixture of factor sets either raises
    AssertionError or changes the outcome against `logits`, the same function of a plain list of tokens.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        *,
        num_kv_blocks: int = 64,
        max_batch_tokens: int = 128,
        max_logit_rows: int = 64,
    ) -> None:
        self.config = config or fake_config()
        self.num_kv_blocks = num_kv_blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_logit_rows = max_logit_rows
        self.kv_block_bytes = KV_BLOCK_SIZE * 12
        self.num_computed_tokens = 0
        """tokens of all steps so far: what prefix reuse saves and recomputation costs"""
        shape = (num_kv_blocks, KV_BLOCK_SIZE)
        self._tokens = np.full(shape, _EMPTY, np.int32)
        self._positions = np.full(shape, _EMPTY, np.int32)
        self._factors = np.full(shape, _EMPTY, np.int32)

    def run(self, batch: Batch, *, reference: bool = False) -> NDArray[np.float32]:
        """Write the batch into the cache and return logits [R, vocab_size]; `reference` changes nothing here."""
        self._check_shapes(batch)
        self.num_computed_tokens += batch.token_ids.size
        for index in range(batch.context_lens.size):
            self._write(batch, index)
        logits = np.empty((batch.logit_rows.size, self.config.vocab_size), np.float32)
        owners = np.searchsorted(batch.query_starts, batch.logit_rows, side="right") - 1
        for row, (token, owner) in enumerate(zip(batch.logit_rows, owners, strict=True)):
            use_long = bool(batch.use_long_factors[owner])
            context = self._read(batch.block_tables[owner], int(batch.positions[token]) + 1, use_long)
            logits[row] = self.logits(context, use_long_factors=use_long)
        return logits

    def logits(self, context: NDArray[np.int32] | list[int], *, use_long_factors: bool = False) -> NDArray[np.float32]:
        """Return the logits [vocab_size] of the token after `context`."""
        visible = np.asarray(context, np.int32).tobytes() + bytes([use_long_factors])
        state = np.uint64(int.from_bytes(blake2b(visible, digest_size=8).digest(), "little"))
        mixed = state + np.arange(1, self.config.vocab_size + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (((mixed >> np.uint64(40)) / 2**24 - 0.5) * _LOGIT_RANGE).astype(np.float32)

    def _check_shapes(self, batch: Batch) -> None:
        num_tokens, num_sequences = batch.token_ids.size, batch.context_lens.size
        starts, rows = batch.query_starts, batch.logit_rows
        for name in ("token_ids", "positions", "query_starts", "context_lens", "block_tables", "logit_rows"):
            assert getattr(batch, name).dtype == np.int32, f"{name} is not int32"
        assert batch.use_long_factors.dtype == np.bool_
        assert 0 < num_tokens <= self.max_batch_tokens, f"{num_tokens} tokens in a step"
        assert rows.size <= self.max_logit_rows, f"{rows.size} rows of logits in a step"
        assert batch.positions.shape == (num_tokens,)
        assert batch.block_tables.shape[0] == num_sequences == batch.use_long_factors.size
        assert starts.shape == (num_sequences + 1,)
        assert starts[0] == 0
        assert starts[-1] == num_tokens
        assert (np.diff(starts) > 0).all(), "a sequence without tokens"
        assert (np.diff(rows) > 0).all(), "rows of logits out of order"
        assert rows.size == 0 or 0 <= rows[0] <= rows[-1] < num_tokens
        assert ((batch.token_ids >= 0) & (batch.token_ids < self.config.vocab_size)).all()

    def _write(self, batch: Batch, index: int) -> None:
        span = slice(batch.query_starts[index], batch.query_starts[index + 1])
        positions, end = batch.positions[span], batch.context_lens[index]
        assert (positions == np.arange(end - positions.size, end)).all(), "positions do not end at the context length"
        assert positions[0] >= 0
        assert end <= self.config.max_position_embeddings
        blocks = batch.block_tables[index, positions // KV_BLOCK_SIZE]
        assert ((blocks >= 0) & (blocks < self.num_kv_blocks)).all()
        slots = positions % KV_BLOCK_SIZE
        self._tokens[blocks, slots] = batch.token_ids[span]
        self._positions[blocks, slots] = positions
        self._factors[blocks, slots] = batch.use_long_factors[index]

    def _read(self, block_table: NDArray[np.int32], length: int, use_long_factors: bool) -> NDArray[np.int32]:
        blocks = block_table[: -(-length // KV_BLOCK_SIZE)]
        assert (self._positions[blocks].ravel()[:length] == np.arange(length)).all(), "the cache holds other positions"
        assert (self._factors[blocks].ravel()[:length] == use_long_factors).all(), "rope factor sets are mixed"
        context: NDArray[np.int32] = self._tokens[blocks].ravel()[:length]
        return context
