"""Damaged files either load or raise an error of ours; they never crash, hang or eat memory."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miniphi.checkpoint import open_checkpoint, open_gguf, quantize_checkpoint, tokenizer_metadata, write_gguf
from miniphi.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint.tiny_models import (
    byte_level_tokenizer,
    longrope_config,
    random_tensors,
    tiny_config,
    write_folder,
)

SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 1}
MAX_PEAK_BYTES = 32 << 20
Edit = tuple[str, int, int]

# Edits near the beginning hit the header; huge numbers are what counts and lengths are made of.
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["byte", "byte", "u32", "u64", "cut", "insert", "zero", "copy"]),
        st.one_of(st.integers(0, 400), st.integers(0, 40_000)),
        st.one_of(st.integers(0, 255), st.sampled_from([1 << 31, (1 << 32) - 1, 1 << 60, 1 << 63, (1 << 64) - 1])),
    ),
    min_size=1,
    max_size=4,
)


def damage(content: bytes, edits: list[Edit]) -> bytes:
    data = bytearray(content)
    for kind, place, value in edits:
        at = place % max(1, len(data))
        if kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = bytes([value % 256])
        elif kind == "zero":
            data[at : at + 16] = bytes(16)
        elif kind == "copy":
            data[at : at + 24] = data[value % max(1, len(data)) :][:24]
        else:
            size = {"byte": 1, "u32": 4, "u64": 8}[kind]
            data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(data)


def survives(path: Path) -> None:
    """Load everything there is to load; only errors of ours, with a message of sane length, and little memory."""
    message = "loaded"
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            for tensor in checkpoint.tensors.values():
                assert tensor.to_float32().shape == tensor.shape
                tensor.release_pages()
            tokenizer_metadata(checkpoint)
    except (CheckpointError, UnsupportedModelError) as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert 0 < len(message) < 5000
    assert peak < MAX_PEAK_BYTES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(**SMALL)
    path = tmp_path_factory.mktemp("fuzz") / "folder"
    extra = {
        "tokenizer.json": byte_level_tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps({"bos_token": "<s>", "chat_template": "x"}).encode(),
        "generation_config.json": b'{"eos_token_id": [2]}',
    }
    return write_folder(path, config, random_tensors(config), extra=extra)


@pytest.fixture(scope="module")
def gguf_files(folder: Path) -> list[Path]:
    paths = [folder.parent / "llama.gguf", folder.parent / "phi3.gguf"]
    with open_checkpoint(folder) as checkpoint:
        quantize_checkpoint(checkpoint, paths[0], scheme="q4")
    config = longrope_config(original=64, **{**SMALL, "head_dim": 16, "num_attention_heads": 2})
    write_gguf(paths[1], config, random_tensors(config))
    return paths


FUZZ: Callable[..., Callable[..., None]] = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(edits=EDITS, which=st.integers(0, 1))
def test_damaged_gguf_files(gguf_files: list[Path], tmp_path: Path, edits: list[Edit], which: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(damage(gguf_files[which].read_bytes(), edits))
    survives(path)


@FUZZ
@given(edits=EDITS)
def test_damaged_safetensors_files(folder: Path, tmp_path: Path, edits: list[Edit]) -> None:
    copy = tmp_path / "copy"
    copy.mkdir(exist_ok=True)
    for file in folder.iterdir():
        content = file.read_bytes()
        (copy / file.name).write_bytes(damage(content, edits) if file.suffix == ".safetensors" else content)
    survives(copy)


@FUZZ
@given(
    edits=EDITS,
    name=st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]),
)
def test_damaged_json_files(folder: Path, tmp_path: Path, edits: list[Edit], name: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir(exist_ok=True)
    for file in folder.iterdir():
        content = file.read_bytes()
        (copy / file.name).write_bytes(damage(content, edits) if file.name == name else content)
    survives(copy)


@FUZZ
@given(content=st.binary(max_size=300))
def test_random_bytes_after_the_magic(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + content)
    survives(path)


def test_every_truncation_of_a_header_is_refused(gguf_files: list[Path], tmp_path: Path) -> None:
    content = gguf_files[1].read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    first = min(tensor.offset for tensor in open_gguf(path).tensors.values())
    for size in range(1, first + 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            open_gguf(path)


def test_damaged_weights_load_as_numbers(gguf_files: list[Path], tmp_path: Path) -> None:
    content = bytearray(gguf_files[0].read_bytes())
    content[-5000:] = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    (tmp_path / "x.gguf").write_bytes(content)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert all(tensor.to_float32().dtype == np.float32 for tensor in checkpoint.tensors.values())
