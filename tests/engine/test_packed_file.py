"""A packed file gives back the same bits, or is refused; nothing else can come of it."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miniphi.checkpoint import Checkpoint, open_checkpoint, write_synthetic_gguf
from miniphi.config import ModelConfig
from miniphi.engine import Batch, packed_file
from miniphi.engine.packed_file import (
    _CHUNK_BYTES,
    _HEADER,
    _HUGE_PAGE,
    PackedModel,
    read_packed_file,
    write_packed_file,
)
from miniphi.engine.program import load_program
from miniphi.engine.weights import pack_weights
from miniphi.errors import CheckpointError, StorageError
from miniphi.kernels import Kind, MappedMatrices, layout_fingerprint
from tests.checkpoint.test_fuzz import EDITS, Edit, damage
from tests.checkpoint.tiny_models import longrope_config, random_tensors, tiny_config, write_folder

IDENTITY = {"files": [["model", 1, 2]]}
ATTACHMENTS = {"empty": b"", "note": "é".encode()}


def write(path: Path, checkpoint: Checkpoint, **changes: Any) -> bool:
    weights = pack_weights(checkpoint.config, checkpoint.tensors, num_threads=1)
    options = {"identity": IDENTITY, "attachments": ATTACHMENTS} | changes
    return write_packed_file(path, checkpoint.config, weights, **options)


def quantized(folder: Path, scheme: str) -> Checkpoint:
    path = folder / f"{scheme}.gguf"
    write_synthetic_gguf(path, tiny_config(hidden_size=256, intermediate_size=256), scheme=scheme)  # type: ignore[arg-type]
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = longrope_config(tie_word_embeddings=True)
    return open_checkpoint(write_folder(tmp_path_factory.mktemp("source") / "tiny", config, random_tensors(config)))


@pytest.fixture(scope="module")
def written(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("packed") / "tiny.packed"
    assert write(path, checkpoint)
    return path.read_bytes()


def logits(model: Checkpoint | PackedModel) -> np.ndarray:
    program = load_program(model, context=64, num_threads=2)
    ids = np.arange(10, 30, dtype=np.int32)
    return program.run(
        Batch(
            token_ids=ids,
            positions=np.arange(len(ids), dtype=np.int32),
            query_starts=np.array([0, len(ids)], np.int32),
            context_lens=np.array([len(ids)], np.int32),
            block_tables=np.zeros((1, 1), np.int32),
            use_long_factors=np.zeros(1, bool),
            logit_rows=np.arange(len(ids), dtype=np.int32),
        )
    )


@pytest.mark.parametrize("scheme", ["f32", "q4", "q8"])
def test_a_mapped_model_computes_the_same_bits(scheme: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint if scheme == "f32" else quantized(tmp_path, scheme)
    write(tmp_path / "packed", source)
    packed = read_packed_file(tmp_path / "packed", identity=IDENTITY)
    assert packed.config == source.config
    assert packed.attachments == ATTACHMENTS
    weights = pack_weights(source.config, source.tensors, num_threads=1)
    assert packed.num_bytes == weights.num_bytes
    assert list(packed.weights.matrices) == list(weights.matrices)
    for name, matrix in weights.matrices.items():
        there = packed.weights.matrices[name]
        assert (there.kind, there.rows, there.depth) == (matrix.kind, matrix.rows, matrix.depth)
        assert np.array_equal(there.packed_bytes, matrix.packed_bytes)
    assert np.array_equal(logits(packed), logits(source))


def test_the_mapping_outlives_the_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "packed"
    write(path, checkpoint)
    packed = read_packed_file(path, identity=IDENTITY)
    write(path, checkpoint)
    path.unlink()
    assert np.array_equal(logits(packed), logits(checkpoint))


def test_matrices_begin_on_a_huge_page_and_are_aligned(written: bytes) -> None:
    _, _, _, json_bytes, head_bytes, file_bytes = _HEADER.unpack(written[: _HEADER.size])
    assert file_bytes == len(written)
    start = _HUGE_PAGE
    assert head_bytes < start
    description = json.loads(written[_HEADER.size : _HEADER.size + json_bytes])
    assert min(offset for *_, offset in description["matrices"].values()) == 0
    assert all(offset % 64 == 0 and start + offset < len(written) for *_, offset in description["matrices"].values())


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.sampled_from([64, 4096, _CHUNK_BYTES - 64, _CHUNK_BYTES, _CHUNK_BYTES + 64]), max_size=6))
def test_chunks_are_whole_until_the_last(sizes: list[int]) -> None:
    pieces = [np.full(size, index + 1, np.uint8) for index, size in enumerate(sizes)]
    chunks = [bytes(chunk) for chunk in packed_file._chunks(iter(pieces))]
    assert b"".join(chunks) == b"".join(piece.tobytes() for piece in pieces)
    assert all(len(chunk) == _CHUNK_BYTES for chunk in chunks[:-1])


def test_another_model_or_layout_is_refused(written: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "packed"
    path.write_bytes(written)
    with pytest.raises(CheckpointError, match="another model"):
        read_packed_file(path, identity=IDENTITY | {"files": []})
    monkeypatch.setattr(packed_file, "layout_fingerprint", lambda kind: layout_fingerprint(kind) + 1)
    with pytest.raises(CheckpointError, match="another layout"):
        read_packed_file(path, identity=IDENTITY)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"", lambda b: b"x" + b[1:]])
def test_a_file_of_another_length_or_kind_is_refused(
    change: Callable[[bytes], bytes], written: bytes, tmp_path: Path
) -> None:
    (tmp_path / "packed").write_bytes(change(written))
    with pytest.raises(CheckpointError, match=r"packed model file|truncated"):
        read_packed_file(tmp_path / "packed", identity=IDENTITY)
    with pytest.raises(CheckpointError):
        read_packed_file(tmp_path, identity=IDENTITY)
    with pytest.raises(CheckpointError, match="No such file"):
        read_packed_file(tmp_path / "absent", identity=IDENTITY)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
def test_damage_before_the_matrices_is_always_noticed(edits: list[Edit], written: bytes, tmp_path: Path) -> None:
    head_end = _HEADER.size + _HEADER.unpack(written[: _HEADER.size])[4]
    damaged = damage(written[:head_end], edits)
    path = tmp_path / "packed"
    path.write_bytes(damaged + written[head_end:])
    if damaged == written[:head_end]:
        assert read_packed_file(path, identity=IDENTITY).num_bytes > 0
        return
    with pytest.raises(CheckpointError):
        read_packed_file(path, identity=IDENTITY)


VALUES = st.sampled_from([None, -1, 0, 1, 63, 64, 1 << 31, 1 << 63, 1 << 70, 0.5, "", "Q4_0", "F32", [], {}, [1, 2]])


def forged(written: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Change the description and put it back with a right checksum."""
    magic, version, _, json_bytes, head_bytes, file_bytes = _HEADER.unpack(written[: _HEADER.size])
    description = json.loads(written[_HEADER.size : _HEADER.size + json_bytes])
    change(description)
    text = json.dumps(description).encode()
    head = text + written[_HEADER.size + json_bytes : _HEADER.size + head_bytes]
    header = _HEADER.pack(magic, version, zlib.crc32(head), len(text), len(head), file_bytes)
    return (header + head).ljust(_HUGE_PAGE, b"\0") + written[_HUGE_PAGE:]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_forged_description_never_crashes(data: st.DataObject, written: bytes, tmp_path: Path) -> None:
    def change(description: dict[str, Any]) -> None:
        value: Any = description
        while isinstance(value, dict | list) and value:
            key = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
            if not isinstance(value[key], dict | list) or not value[key] or data.draw(st.booleans()):
                value[key] = data.draw(VALUES)
                return
            value = value[key]

    path = tmp_path / "packed"
    path.write_bytes(forged(written, change))
    try:
        model = read_packed_file(path, identity=IDENTITY)
    except CheckpointError:
        return
    for matrix in model.weights.matrices.values():
        assert matrix.unpack().shape == (matrix.rows, matrix.depth)


def test_what_a_matrix_may_be_is_checked(written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "packed"
    path.write_bytes(written)
    with path.open("rb") as file:
        mapped = MappedMatrices(file.fileno(), len(written))
    assert mapped.matrix(Kind.F32, 32, 8, len(written) - 1024).num_bytes == 1024
    for kind, rows, depth, offset in (
        (Kind.F32, 32, 8, len(written) - 1024 + 64),
        (Kind.F32, 33, 8, len(written) - 1024),
        (Kind.F32, 32, 8, 32),
        (Kind.F32, 0, 8, 0),
        (Kind.F32, 1 << 28, 1 << 28, 0),
        (Kind.F32, 1 << 62, 1 << 62, 0),
        (Kind.F32, 32, 8, (1 << 64) - 64),
        (Kind.Q4_0, 32, 31, 0),
        (Kind.Q4_K, 32, 32, 0),
    ):
        with pytest.raises(ValueError, match=r"shape|fit"):
            mapped.matrix(kind, rows, depth, offset)


def test_layouts_have_fingerprints_of_their_own() -> None:
    assert len({layout_fingerprint(kind) for kind in Kind}) == len(Kind) - 2, (
        "F16 and BF16 lie alike, Q4_0 and IQ4_NL too"
    )
    assert layout_fingerprint(Kind.F16) == layout_fingerprint(Kind.BF16)


def test_a_writer_that_is_stopped_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert not write(tmp_path / "packed", checkpoint, should_stop=lambda: True)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_not_touched(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 30))
    with pytest.raises(StorageError, match=r"needs 1\.0.* GB of free disk space"):
        write(tmp_path / "packed", checkpoint)
    assert not list(tmp_path.iterdir())


def test_every_configuration_comes_back(tmp_path: Path) -> None:
    configs: list[ModelConfig] = [
        tiny_config(sliding_window=16, eos_token_ids=(), pad_token_id=0, partial_rotary_factor=0.5),
        longrope_config(),
    ]
    for config in configs:
        folder = write_folder(tmp_path / config.model_type, config, random_tensors(config))
        with open_checkpoint(folder) as checkpoint:
            write(tmp_path / "packed", checkpoint)
            assert read_packed_file(tmp_path / "packed", identity=IDENTITY).config == checkpoint.config
