"""config.json of Hugging Face, old and new, to the fields of `ModelConfig`."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from miniphi.config.fields import Fields, head_dim_of, require_model_type
from miniphi.config.rope import LONGROPE_NAMES, RopeScaling, attention_factor
from miniphi.errors import CheckpointError, UnsupportedModelError

# Keys that cannot change what the model computes at inference.
_NEUTRAL_KEYS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "dtype",
        "embd_pdrop",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)

# Keys that we support for these values only; the first one is named in the error.
_FIXED_KEYS: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "chunk_size_feed_forward": (0, None),
    "full_attn_mod": (1, None),
    "hidden_act": ("silu",),
    "interpolate_factor": (1, None),
    "is_encoder_decoder": (False, None),
    "lm_head_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
}

_DEFAULT_ROPE_THETA = 10000.0  # what transformers assumes where the key is absent

_Number = TypeVar("_Number", int, float)


def read_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ModelConfig's fields. Raises as `ModelConfig.from_hf`."""
    fields = Fields(config)
    model_type = require_model_type("model_type", fields.value("model_type"))
    fields.require_fixed(_FIXED_KEYS)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    max_positions = fields.integer("max_position_embeddings")
    rope = _rope_fields(fields)
    pad = fields.optional_integer("pad_token_id")
    shape = {
        "model_type": model_type,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.optional_integer("head_dim") or head_dim_of(hidden, heads),
        "max_position_embeddings": max_positions,
        "rms_norm_eps": fields.number("rms_norm_eps"),
        "rope_theta": _agreed(fields, rope, "rope_theta", Fields.optional_number, _DEFAULT_ROPE_THETA),
        "partial_rotary_factor": _agreed(fields, rope, "partial_rotary_factor", Fields.optional_number, 1.0),
        "rope_scaling": _hf_rope_scaling(fields, rope, model_type, max_positions),
        "sliding_window": fields.optional_integer("sliding_window") if model_type == "phi3" else None,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
        "bos_token_id": fields.optional_integer("bos_token_id"),
        "eos_token_ids": fields.integers("eos_token_id"),
        "pad_token_id": None if pad == -1 else pad,  # LLaMA's first configs say -1 for none
    }
    rope.require_all_known()
    fields.require_all_known(_NEUTRAL_KEYS)
    return shape


def _rope_fields(fields: Fields) -> Fields:
    """Return the RoPE block, which is called rope_parameters since transformers 5."""
    old, new = fields.block("rope_scaling"), fields.block("rope_parameters")
    if old and new and old != new:
        raise CheckpointError("rope_scaling and rope_parameters disagree; keep one of them")
    return Fields(old, label="rope_scaling.") if old else Fields(new, label="rope_parameters.")


def _agreed(
    fields: Fields, rope: Fields, name: str, read: Callable[[Fields, str], _Number | None], default: _Number
) -> _Number:
    """Return what either place says, if they do not contradict each other."""
    outer, inner = read(fields, name), read(rope, name)
    if outer is not None and inner is not None and outer != inner:
        raise CheckpointError(f"{name} is {outer} at the top level and {inner} in the RoPE block")
    return inner if inner is not None else outer if outer is not None else default


def _hf_rope_scaling(fields: Fields, rope: Fields, model_type: str, max_positions: int) -> RopeScaling | None:
    names = {str(rope.value(key)) for key in ("rope_type", "type") if rope.has(key)} or {"default"}
    original = _agreed(fields, rope, "original_max_position_embeddings", Fields.optional_integer, 0)
    if names == {"default"}:
        return None
    supported = LONGROPE_NAMES[model_type]
    if not names.issubset(supported):
        raise UnsupportedModelError(
            f"the RoPE type is {' and '.join(sorted(names))}; supported are default, {', '.join(supported)}"
        )
    if not original:
        raise CheckpointError("original_max_position_embeddings is missing; longrope needs it")
    scale = rope.number("factor", max_positions / max(original, 1))
    return RopeScaling(
        long_factor=rope.numbers("long_factor"),
        short_factor=rope.numbers("short_factor"),
        original_max_position_embeddings=original,
        attention_factor=rope.number("attention_factor", attention_factor(scale, original)),
    )
