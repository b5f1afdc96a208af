"""What a piece of work must cost on a machine: bytes to read and int8 operations to do, and the speed that follows.

Arithmetic only. A model's weights are read once per step, whatever the number of tokens in it; a token's keys and
values once per sequence that attends to them. Attention counts as int8 operations, as if all of it could use them.
"""

from dataclasses import dataclass
from pathlib import Path

from miniphi.checkpoint import Checkpoint
from miniphi.config import ModelConfig

EMBEDDINGS = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the machine gave at one moment, all threads together."""

    int8_ops_per_s: float
    read_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one step of some work needs: a whole prompt, or one token of every stream."""

    num_tokens: int
    num_bytes: float
    num_ops: float

    def seconds(self, limits: Limits) -> float:
        """Return the least time of a step: reading and computing go on at once."""
        return max(self.num_bytes / limits.read_bytes_per_s, self.num_ops / limits.int8_ops_per_s)

    def tokens_per_s(self, limits: Limits) -> float:
        """Return the speed that the machine allows."""
        return self.num_tokens / self.seconds(limits)

    def ops_per_s(self, tokens_per_s: float) -> float:
        """Return how many operations a speed amounts to."""
        return tokens_per_s * self.num_ops / self.num_tokens

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.num_ops / self.num_bytes


def prefill_demand(config: ModelConfig, *, weight_bytes: float, num_tokens: int) -> Demand:
    """Return what one prompt of `num_tokens` needs; each token attends to half of them on average."""
    ops = 2 * num_tokens * _layer_weights(config) + num_tokens * _attention_ops(config, num_tokens / 2)
    return Demand(num_tokens=num_tokens, num_bytes=weight_bytes, num_ops=ops + 2 * _head_weights(config))


def decode_demand(
    config: ModelConfig, *, weight_bytes: float, kv_value_bytes: float, depth: float, streams: int = 1
) -> Demand:
    """Return what one token of each of `streams` sequences needs, with `depth` tokens in each sequence's cache."""
    kv_bytes = config.kv_values_per_token * kv_value_bytes * depth
    ops = 2 * (_layer_weights(config) + _head_weights(config)) + _attention_ops(config, depth)
    return Demand(num_tokens=streams, num_bytes=weight_bytes + streams * kv_bytes, num_ops=streams * ops)


def gguf_weight_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of a file's weights that every step reads: all but an embedding table of its own."""
    embeddings = 0 if checkpoint.config.tie_word_embeddings else checkpoint.tensors[EMBEDDINGS].num_bytes
    return checkpoint.num_bytes - embeddings


def openvino_weight_bytes(config: ModelConfig, folder: Path) -> int:
    """Return the same for a folder of benchmarks.openvino_model, whose embeddings have a scale and a zero per row."""
    embeddings = 0 if config.tie_word_embeddings else config.vocab_size * (config.hidden_size + 3)
    return (folder / "openvino_model.bin").stat().st_size - embeddings


def _layer_weights(config: ModelConfig) -> int:
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    matrices = config.hidden_size * (2 * queries + 2 * keys) + 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * matrices


def _head_weights(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def _attention_ops(config: ModelConfig, depth: float) -> float:
    """Return one token's operations with q, k and with v, over all layers."""
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * depth
