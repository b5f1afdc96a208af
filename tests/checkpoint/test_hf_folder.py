import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miniphi.checkpoint import Format, TensorSource, open_checkpoint
from miniphi.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint.tiny_models import longrope_config, random_tensors, tiny_config, write_folder


def make_folder(path: Path, files: dict[str, Any] | None = None, **changes: Any) -> Path:
    config = tiny_config(**changes)
    extra = {
        name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in (files or {}).items()
    }
    return write_folder(path, config, random_tensors(config), extra=extra)


def test_longrope_configuration_survives(tmp_path: Path) -> None:
    config = longrope_config(tie_word_embeddings=True)
    folder = write_folder(tmp_path / "m", config, random_tensors(config))
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.config == config
        assert "lm_head.weight" not in checkpoint.tensors
        assert checkpoint.tokenizer_source is None
        assert checkpoint.chat_template is None
        assert checkpoint.generation_eos_token_ids == (2,)
        assert checkpoint.metadata == {"format": "pt"}


def test_tokenizer_and_generation_files_are_found(tmp_path: Path) -> None:
    files = {
        "tokenizer.json": {"model": {}},
        "tokenizer_config.json": {"chat_template": "T", "bos_token": "<s>"},
        "generation_config.json": {"eos_token_id": [7, 2, 7]},
    }
    with open_checkpoint(make_folder(tmp_path / "m", files)) as checkpoint:
        assert checkpoint.tokenizer_source == (
            "files",
            tmp_path / "m" / "tokenizer.json",
            files["tokenizer_config.json"],
        )
        assert checkpoint.chat_template == "T"
        assert checkpoint.generation_eos_token_ids == (7, 2)


def test_one_eos_id_and_the_template_file(tmp_path: Path) -> None:
    files = {
        "chat_template.jinja": "from the file ▁".encode(),
        "tokenizer_config.json": {"chat_template": "T"},
        "generation_config.json": {"eos_token_id": 5},
    }
    with open_checkpoint(make_folder(tmp_path / "m", files)) as checkpoint:
        assert checkpoint.chat_template == "from the file ▁"
        assert checkpoint.generation_eos_token_ids == (5,)


def test_default_of_several_templates(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
    with open_checkpoint(
        make_folder(tmp_path / "m", {"tokenizer_config.json": {"chat_template": templates}})
    ) as checkpoint:
        assert checkpoint.chat_template == "B"


BAD_FILES = {
    "no default": ("tokenizer_config.json", {"chat_template": [{"name": "a", "template": "b"}]}, "named 'default'"),
    "odd template": ("tokenizer_config.json", {"chat_template": 3}, "expected text or a list"),
    "odd entry": ("tokenizer_config.json", {"chat_template": ["a"]}, "expected objects with name and template"),
    "odd default": ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": 1}]}, "expected text"),
    "template bytes": ("chat_template.jinja", b"\xff", "not UTF-8"),
    "eos range": (
        "generation_config.json",
        {"eos_token_id": 320},
        "eos_token_id is 320, expected a token id below 320",
    ),
    "eos type": ("generation_config.json", {"eos_token_id": [True]}, "eos_token_id is True"),
    "json": ("generation_config.json", b"{", "not valid JSON"),
    "list": ("tokenizer_config.json", b"[]", "expected a JSON object, found list"),
    "depth": ("tokenizer_config.json", b'{"a":' * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_side_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    folder = make_folder(tmp_path / "m", {name: content})
    with pytest.raises(CheckpointError, match=name) as caught:
        open_checkpoint(folder)
    assert message in str(caught.value)


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"has no config\.json; expected a Hugging Face model folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"name it: .*x\.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="name the folder"):
        open_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint("nul\0byte")


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin, a pickle.*convert it to safetensors"):
        open_checkpoint(folder)
    with pytest.raises(UnsupportedModelError, match="is a pickle"):
        open_checkpoint(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        open_checkpoint(folder)


def rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replace the weights of a folder by tensors that need not fit its configuration."""
    from safetensors.numpy import save_file

    save_file(tensors, folder / "model.safetensors")


def test_tensors_must_fit_the_configuration(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    tensors = random_tensors(tiny_config())
    rewrite(folder, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == list(tensors)
    rewrite(folder, {**tensors, "model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)})
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.self_attn\.q_proj\.bias' is not part"):
        open_checkpoint(folder)
    rewrite(folder, {**tensors, "model.norm.weight": np.ones((64, 1), np.float32)})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has shape \[64, 1\]"):
        open_checkpoint(folder)
    rewrite(folder, {("x" if name == "lm_head.weight" else name): tensor for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing"):
        open_checkpoint(folder)
    rewrite(folder, {"model.norm.weight": np.ones(64, np.float32)})
    with pytest.raises(CheckpointError, match="2 layers need 21 tensors, found 1"):
        open_checkpoint(folder)


def test_a_tied_models_repeated_head_must_be_a_copy(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", tie_word_embeddings=True)
    tensors = random_tensors(tiny_config(tie_word_embeddings=True))
    rewrite(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    with open_checkpoint(folder) as checkpoint:
        assert "lm_head.weight" not in checkpoint.tensors
    rewrite(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize("fmt", [Format.F16, Format.BF16])
def test_half_precision_folders(tmp_path: Path, fmt: Format) -> None:
    config = tiny_config("phi3")
    tensors = random_tensors(config)
    sources = {name: TensorSource.from_floats(tensor, fmt) for name, tensor in tensors.items()}
    with open_checkpoint(write_folder(tmp_path / "m", config, sources)) as checkpoint:
        for name, tensor in tensors.items():
            assert checkpoint.tensors[name].format is fmt
            values = checkpoint.tensors[name].to_float32()
            np.testing.assert_allclose(values, tensor, rtol=2**-8, atol=1e-7)
