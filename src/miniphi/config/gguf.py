"""Metadata of a GGUF file, as llama.cpp's converter writes it, to the fields of `ModelConfig`."""

import struct
from collections.abc import Iterable, Mapping
from typing import Any

from miniphi.config.fields import MAX_FLOAT32, Fields, head_dim_of, require_model_type
from miniphi.config.rope import RopeScaling, attention_factor
from miniphi.errors import CheckpointError, UnsupportedModelError

_DEFAULT_ROPE_THETA = 10000.0  # what llama.cpp assumes where the key is absent


def read_gguf(
    metadata: Mapping[str, object],
    long_factor: Iterable[float] | None,
    short_factor: Iterable[float] | None,
) -> dict[str, Any]:
    """Return ModelConfig's fields without `tie_word_embeddings`. Raises as `ModelConfig.from_gguf`."""
    arch = require_model_type("general.architecture", metadata.get("general.architecture"))
    own = {key: value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    fields = Fields(own, prefix=f"{arch}.")
    tokens = Fields(metadata, prefix="tokenizer.ggml.")
    heads, hidden = fields.size("attention.head_count"), fields.size("embedding_length")
    head_dim = fields.optional_size("attention.key_length") or head_dim_of(hidden, heads)
    fields.require_fixed({"attention.value_length": (head_dim, None), "expert_count": (0, None)})
    max_positions = fields.size("context_length")
    ends = (tokens.optional_integer(f"{name}_token_id") for name in ("eos", "eot", "eom"))
    shape = {
        "model_type": arch,
        "vocab_size": fields.optional_size("vocab_size") or _token_count(metadata),
        "hidden_size": hidden,
        "intermediate_size": fields.size("feed_forward_length"),
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": _shortest_float32(fields.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest_float32(fields.number("rope.freq_base", _DEFAULT_ROPE_THETA)),
        "partial_rotary_factor": fields.size("rope.dimension_count", head_dim) / head_dim,
        "rope_scaling": _gguf_rope_scaling(fields, long_factor, short_factor, max_positions),
        "sliding_window": _sliding_window(fields) if arch == "phi3" else None,
        "bos_token_id": tokens.optional_integer("bos_token_id"),
        "eos_token_ids": tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None)),
        "pad_token_id": tokens.optional_integer("padding_token_id"),
    }
    fields.require_all_known()
    return shape


def _gguf_rope_scaling(
    fields: Fields, long_factor: Iterable[float] | None, short_factor: Iterable[float] | None, max_positions: int
) -> RopeScaling | None:
    original = fields.size("rope.scaling.original_context_length", max_positions)
    given = fields.optional_number("rope.scaling.attn_factor")
    fields.require_fixed({"rope.scaling.type": ("none", "longrope", None), "rope.scaling.factor": (1.0, 0.0, None)})
    fields.value("rope.scaling.finetuned")
    if long_factor is None and short_factor is None:
        if original != max_positions or given not in (None, 1.0):
            raise UnsupportedModelError(
                f"context {max_positions} extends {original} positions, but the file has no rope_factors "
                "tensors; convert the model again with a current llama.cpp"
            )
        return None
    if long_factor is None or short_factor is None:
        raise CheckpointError("one of rope_factors_long and rope_factors_short is missing")
    computed = attention_factor(max_positions / original, original)
    # The file rounds to float32; where it only repeats the formula, the exact number is kept.
    return RopeScaling(
        long_factor=tuple(map(float, long_factor)),
        short_factor=tuple(map(float, short_factor)),
        original_max_position_embeddings=original,
        attention_factor=computed if given is None or _float32(given) == _float32(computed) else given,
    )


def _sliding_window(fields: Fields) -> int | None:
    return fields.optional_integer("attention.sliding_window") or None  # llama.cpp writes 0 for none


def _token_count(metadata: Mapping[str, object]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list | tuple):
        raise CheckpointError("neither a vocab_size nor tokenizer.ggml.tokens is present")
    return len(tokens)


def _float32(value: float) -> float:
    """Round as a file does; `value` is within float32's range."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)


def _shortest_float32(value: float) -> float:
    """Return the number with the fewest digits that rounds to the same float32: 9.999999747378752e-06 was 1e-05."""
    rounded = _float32(value)
    candidates = (float(f"{rounded:.{digits}g}") for digits in range(1, 10))
    return next(
        (candidate for candidate in candidates if abs(candidate) <= MAX_FLOAT32 and _float32(candidate) == rounded),
        rounded,
    )
