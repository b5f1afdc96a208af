"""What we write means the same to llama.cpp, and to transformers, as it means to us."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miniphi.checkpoint import open_checkpoint, tokenizer_metadata, write_gguf
from tests.checkpoint.tiny_models import (
    byte_level_tokenizer,
    longrope_config,
    random_tensors,
    sentencepiece_tokenizer,
    tiny_config,
    write_folder,
)

SCRIPT = Path(__file__).with_name("llama_cpp_logprobs.py")
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def llama_cpp_logprobs(model: Path, context_length: int, prompts: list[list[int]]) -> dict[str, Any]:
    pytest.importorskip("xllamacpp")
    command = [sys.executable, str(SCRIPT), str(model), str(context_length), json.dumps(prompts)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"prompt"')]
    return json.loads(lines[-1][: lines[-1].rindex("}}") + 2])


def transformers_logprobs(folder: Path, prompt: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], dim=-1).numpy()


def prompts(length: int, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, vocab_size - 40, length).tolist() for _ in range(40)]


CASES = {
    "llama": (tiny_config(), 256, 12),
    "llama, tied": (tiny_config(tie_word_embeddings=True), 256, 12),
    "llama, wide heads": (tiny_config(head_dim=32), 256, 12),
    "phi3": (tiny_config("phi3"), 256, 12),
    # llama.cpp chooses the factors by its context, of which 256 is the least.
    "phi3, short factors": (longrope_config(original=256), 256, 12),
    "phi3, long factors": (longrope_config(num_key_value_heads=4), 256, 100),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")  # those of transformers and torch are theirs
def test_llama_cpp_and_transformers_agree_on_what_we_write(tmp_path: Path, case: str) -> None:
    config, context_length, length = CASES[case]
    tokenizer = byte_level_tokenizer() if config.model_type == "llama" else sentencepiece_tokenizer()
    extra = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(SPECIAL_TOKENS).encode(),
    }
    folder = write_folder(tmp_path / "folder", config, random_tensors(config), extra=extra)
    with open_checkpoint(folder) as checkpoint:
        write_gguf(
            tmp_path / "model.gguf",
            checkpoint.config,
            checkpoint.tensors,
            tokenizer_metadata=tokenizer_metadata(checkpoint),
            name="tiny",
        )
    answer = llama_cpp_logprobs(tmp_path / "model.gguf", context_length, prompts(length, config.vocab_size))
    expected = transformers_logprobs(folder, answer["prompt"])
    ids = [int(token_id) for token_id in answer["logprobs"]]
    assert len(ids) == 50
    np.testing.assert_allclose(list(answer["logprobs"].values()), expected[ids], atol=2e-4)
    assert expected[ids[0]] - expected[ids[-1]] > 1, "the model is too flat for the comparison to mean anything"
