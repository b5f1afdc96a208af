"""Tokenizers for tests: two tiny ones made here, and the real ones from GGUF files where those are present."""

from functools import cache
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from miniphi.tokenizer import Tokenizer
from tests.shared_data import shared_path, smollm2_gguf

PHI3_SPECIAL = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
CHATML_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@cache
def phi3_metadata() -> dict[str, Any]:
    return read_metadata(shared_path("tokenizer/ggml-vocab-phi-3.gguf"))


@cache
def smollm2_metadata() -> dict[str, Any]:
    return read_metadata(smollm2_gguf())


@cache
def phi3() -> Tokenizer:
    return Tokenizer.from_gguf(phi3_metadata(), source="phi-3")


@cache
def smollm2() -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_metadata(), source="smollm2")


def read_metadata(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def tiny_bpe_metadata(special: tuple[str, ...] = CHATML_SPECIAL, pre: str = "gpt-2") -> dict[str, Any]:
    """Byte-level BPE: the 256 letters for bytes, a few merges, and special tokens first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(code) for code in [*printable, *range(0x100, 0x144)]]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("i", "m"), ("Ã", "©")]
    tokens = [*special, *letters, *(left + right for left, right in merges)]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(tokens) - len(special)),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def tiny_spm_metadata(architecture: str = "phi3") -> dict[str, Any]:
    """SentencePiece BPE with byte fallback, a few pieces, and the special tokens of Phi-3 with one unused id."""
    pieces = ["▁", *"abcdehlopstu", "he", "ll", "▁he", "llo", "▁hello", "s>", "</", "</s", "▁▁", "<", "/", ">", "|"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *PHI3_SPECIAL, "[PAD]"]
    types = [2, 3, 4, *[6] * 256, *[1] * len(pieces), *[3] * len(PHI3_SPECIAL), 5]
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": tokens.index("<|endoftext|>"),
    }


@cache
def tiny_bpe() -> Tokenizer:
    return Tokenizer.from_gguf(tiny_bpe_metadata(), source="tiny-bpe")


@cache
def tiny_spm() -> Tokenizer:
    return Tokenizer.from_gguf(tiny_spm_metadata(), source="tiny-spm")
