"""Configurations of tiny models as files have them: config.json and GGUF metadata."""

from typing import Any

from miniphi.config import ModelConfig

FACTORS = tuple(1.0 + 0.25 * index for index in range(8))


def small_hf(**changes: Any) -> dict[str, Any]:
    """A Phi-3 of 2 layers with head_dim 16, as a config.json."""
    config = {
        "model_type": "phi3",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": 2,
        "sliding_window": 2047,
    }
    return {key: value for key, value in (config | changes).items() if value != "absent"}


def longrope(**changes: Any) -> dict[str, Any]:
    scaling = {"type": "longrope", "long_factor": list(FACTORS), "short_factor": [1.0] * 8} | changes
    return {key: value for key, value in scaling.items() if value != "absent"}


def small_gguf(arch: str = "phi3", **changes: Any) -> dict[str, Any]:
    own = {
        "context_length": 4096,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
    } | changes
    return {
        "general.architecture": arch,
        **{f"{arch}.{key}": value for key, value in own.items() if value != "absent"},
        "tokenizer.ggml.tokens": ["x"] * 100,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
    }


def read_gguf(metadata: dict[str, Any], **options: Any) -> ModelConfig:
    return ModelConfig.from_gguf(metadata, **({"tied": False, "source": "m.gguf"} | options))
