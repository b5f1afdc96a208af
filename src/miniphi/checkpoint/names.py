"""Which tensors a model has: their Hugging Face names, shapes, GGUF names, and the row order of GGUF q and k.

Owns the naming. Knows no file format.
"""

import numpy as np
import numpy.typing as npt

from miniphi.config import ModelConfig
from miniphi.errors import UnsupportedModelError

__all__ = [
    "EMBEDDINGS",
    "LM_HEAD",
    "expected_shapes",
    "gguf_names",
    "gguf_row_order",
    "has_permuted_rows",
    "is_harmless_surplus",
    "num_expected_tensors",
]

EMBEDDINGS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

# Hugging Face name inside a layer -> GGUF name inside a block. A phi3 GGUF keeps the fused matrices: `attn_qkv` has
# rows q|k|v, and `ffn_up` has rows gate|up.
_LAYER_NAMES = {
    "phi3": {
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    "llama": {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
}


def _layer_names(config: ModelConfig) -> dict[str, str]:
    names = _LAYER_NAMES.get(config.model_type)
    if names is None:
        expected = ", ".join(sorted(_LAYER_NAMES))
        raise UnsupportedModelError(f"model_type {config.model_type!r} is not supported; expected one of {expected}")
    return names


def num_expected_tensors(config: ModelConfig) -> int:
    """Count the tensors of a model without listing them (the number of layers may be absurd)."""
    return config.num_hidden_layers * len(_layer_names(config)) + (2 if config.tie_word_embeddings else 3)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model by Hugging Face name, in the order of the model."""
    hidden, inter = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    parts: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.qkv_proj": (q_rows + 2 * kv_rows, hidden),
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_up_proj": (2 * inter, hidden),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }
    names = _layer_names(config)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDINGS: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes.update({f"model.layers.{layer}.{part}.weight": parts[part] for part in names})
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Return the GGUF name of every tensor by Hugging Face name, in the order of the model."""
    names = {EMBEDDINGS: "token_embd.weight"}
    for layer in range(config.num_hidden_layers):
        for part, gguf_part in _layer_names(config).items():
            names[f"model.layers.{layer}.{part}.weight"] = f"blk.{layer}.{gguf_part}.weight"
    names["model.norm.weight"] = "output_norm.weight"
    if not config.tie_word_embeddings:
        names[LM_HEAD] = "output.weight"
    return names


def has_permuted_rows(config: ModelConfig, name: str) -> bool:
    """Tell whether GGUF stores the rows of this tensor in another order than Hugging Face."""
    return config.model_type == "llama" and name.endswith((".self_attn.q_proj.weight", ".self_attn.k_proj.weight"))


def gguf_row_order(num_rows: int, head_dim: int) -> npt.NDArray[np.int32]:
    """Return where GGUF `llama` files keep each Hugging Face row of q_proj or k_proj, int32 [num_rows].

    Hugging Face rotates row j of a head together with row j + head_dim/2; GGUF rotates neighbours, so its converter
    interleaves the halves: GGUF row 2j + s of a head is Hugging Face row s * head_dim/2 + j.
    """
    order = np.arange(num_rows, dtype=np.int32).reshape(-1, head_dim // 2, 2)
    return np.ascontiguousarray(order.transpose(0, 2, 1)).reshape(num_rows)


def is_harmless_surplus(name: str) -> bool:
    """Tell whether a tensor that the model does not need may be ignored: old files store the rotary frequencies."""
    return name.endswith(".rotary_emb.inv_freq")
