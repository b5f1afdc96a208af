"""Small random models and tokenizers for the tests of checkpoints."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from miniphi.checkpoint import expected_shapes
from miniphi.config import ModelConfig, RopeScaling

VOCAB_SIZE = 320


def tiny_config(model_type: str = "llama", **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "pad_token_id": None,
    }
    return ModelConfig(**{**values, **changes})


def longrope_config(original: int = 64, **changes: Any) -> ModelConfig:
    """A phi3 configuration whose context is four times the original one."""
    scaling = RopeScaling(
        long_factor=tuple(1.0 + 0.5 * index for index in range(8)),
        short_factor=tuple(1.0 + 0.125 * index for index in range(8)),
        original_max_position_embeddings=original,
        attention_factor=math.sqrt(1 + math.log(4) / math.log(original)),
    )
    return tiny_config("phi3", rope_scaling=scaling, max_position_embeddings=4 * original, **changes)


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        values = rng.standard_normal(shape).astype(np.float32)
        tensors[name] = 1 + 0.1 * values if len(shape) == 1 else values * np.float32(0.3)
    return tensors


def _train(tokenizer: Tokenizer, corpus: str, vocab_size: int, alphabet: list[str]) -> None:
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"]
    )
    tokenizer.train_from_iterator([corpus] * 3, trainer)


CORPUS = "the cat sat on the mat and the dog ate the hat that the cat had left on the red mat in the hall " * 3


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer that splits like SmolLM's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, CORPUS, 300, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.add_tokens([AddedToken("<extra>", special=False)])
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """A BPE tokenizer with byte fallback and "▁" for spaces, as converted from SentencePiece."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    _train(trained, CORPUS, 60, [])
    spec = json.loads(trained.to_str())
    learned = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned[3:]]
    spec["model"]["vocab"] = {text: index for index, text in enumerate(texts)}
    spec["model"]["byte_fallback"] = True
    spec["model"]["fuse_unk"] = True
    return Tokenizer.from_str(json.dumps(spec))


def write_folder(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    extra: Mapping[str, bytes] | None = None,
    **options: Any,
) -> Path:
    from miniphi.checkpoint import save_safetensors

    save_safetensors(folder, config, tensors, extra_files=extra, **options)
    return folder
