import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miniphi.checkpoint import Format, TensorSource, expected_shapes, open_checkpoint, save_safetensors
from miniphi.checkpoint.safetensors import open_safetensors, open_sharded_safetensors
from miniphi.errors import CheckpointError, StorageError
from tests.checkpoint.tiny_models import random_tensors, tiny_config, write_folder


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


NL4 = {"format": "NL4", "columns": 64}


def blocks(value: Any) -> dict[str, Any]:
    return {"__metadata__": {"miniphi.blocks": value if isinstance(value, str) else json.dumps(value)}}


def test_quantised_tensors_are_bytes_to_the_reference_and_blocks_to_us(tmp_path: Path) -> None:
    from safetensors import safe_open

    config = tiny_config(tie_word_embeddings=True)
    formats = (Format.NL4, Format.Q8_0, Format.IQ4_NL)
    tensors: dict[str, TensorSource] = {}
    rows: dict[str, np.ndarray] = {}
    for number, (name, shape) in enumerate(expected_shapes(config).items()):
        fmt = formats[number % 3]
        if len(shape) == 1 or shape[1] % fmt.block_size:
            tensors[name] = TensorSource.from_floats(np.full(shape, number, np.float32))
        else:
            rows[name] = np.random.default_rng(number).integers(
                0, 256, (shape[0], fmt.row_bytes(shape[1])), dtype=np.uint8
            )
            tensors[name] = TensorSource.from_bytes(rows[name], fmt, shape)
    save_safetensors(tmp_path / "m", config, tensors, max_shard_bytes=30_000, num_threads=2)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    with open_checkpoint(tmp_path / "m") as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            assert (tensor.format, tensor.shape) == (tensors[name].format, tensors[name].shape)
            if name in rows:
                np.testing.assert_array_equal(tensor.raw, rows[name])
            else:
                np.testing.assert_array_equal(tensor.to_float32(), tensor.to_float32().flat[0])
    for path in (tmp_path / "m").glob("*.safetensors"):
        with safe_open(path, "np") as reference:
            for name in reference.keys():  # noqa: SIM118 - not a mapping
                if name in rows:
                    np.testing.assert_array_equal(reference.get_tensor(name), rows[name])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reads_what_the_reference_writes(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {
        "a": torch.randn(5, 7, dtype=getattr(torch, dtype)),
        "b": torch.randn(11).to(getattr(torch, dtype)),
        "none": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = open_safetensors(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.tensors[name].to_float32(), tensor.float().numpy())
        assert not file.tensors[name].raw.flags.writeable


def test_writes_what_the_reference_reads(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    config = tiny_config()
    tensors = random_tensors(config)
    stored: dict[str, Any] = dict(tensors)
    stored["lm_head.weight"] = TensorSource.from_floats(tensors["lm_head.weight"], Format.F16)
    save_safetensors(tmp_path / "m", config, stored, extra_files={"note.txt": b"hello"})
    read = load_file(tmp_path / "m" / "model.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        expected = tensor.astype(np.float16) if name == "lm_head.weight" else tensor
        np.testing.assert_array_equal(read[name], expected)
        assert read[name].dtype == expected.dtype
    assert (tmp_path / "m" / "note.txt").read_bytes() == b"hello"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_shards_round_trip_and_are_indexed(tmp_path: Path) -> None:
    config = tiny_config("phi3")
    tensors = random_tensors(config)
    folder = write_folder(tmp_path / "m", config, tensors, max_shard_bytes=60_000)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name in shards:
        size = sum(tensors[key].nbytes for key, shard in index["weight_map"].items() if shard == name)
        assert size <= 60_000 or list(index["weight_map"].values()).count(name) == 1
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == config
        assert list(checkpoint.tensors) == list(tensors)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(checkpoint.tensors[name].to_float32(), tensor)


BAD_HEADERS = {
    "not an object": (b"[1]", b"", "does not begin with"),
    "not JSON": (b"{nonsense}", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", "not valid JSON"),
    "duplicate": (b'{"a":1,"a":2}', b"", "'a' appears twice"),
    "NaN": (b'{"a":NaN}', b"", "NaN is not JSON"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "map strings to strings"),
    "entry": ({"a": 3}, b"", "expected exactly dtype, shape and data_offsets"),
    "surplus key": ({"a": {**entry(), "x": 1}}, b"\0" * 24, "expected exactly"),
    "dtype": ({"w": entry("I64", (3,), (0, 24))}, b"\0" * 24, "tensor 'w': has dtype 'I64', expected one of F32"),
    "dtype type": ({"w": {**entry(), "dtype": [1]}}, b"\0" * 24, "has dtype"),
    "negative": ({"w": entry(shape=(-2, -3))}, b"\0" * 24, "has shape"),
    "float": ({"w": entry(shape=(2.0, 3))}, b"\0" * 24, "has shape"),
    "bool": ({"w": entry(shape=(True, 6))}, b"\0" * 24, "has shape"),
    "overflow": ({"w": entry(shape=(1 << 62, 4), offsets=(0, 0))}, b"", "takes 73786976294838206464 bytes"),
    "dimensions": ({"w": entry(shape=[1] * 9, offsets=(0, 4))}, b"\0" * 4, "has shape"),
    "offsets": ({"w": entry(offsets=(0, 24, 48))}, b"\0" * 24, "expected two whole numbers"),
    "reversed": ({"w": entry(offsets=(24, 0))}, b"\0" * 24, "give it -24"),
    "size": ({"w": entry(offsets=(0, 20))}, b"\0" * 20, "takes 24 bytes, but data_offsets give it 20"),
    "truncated": ({"w": entry()}, b"\0" * 23, "take 24 bytes, but the file holds 23"),
    "appended": ({"w": entry()}, b"\0" * 25, "something appended"),
    "hole": ({"w": entry(offsets=(4, 28))}, b"\0" * 28, "leaves a hole"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 28))}, b"\0" * 28, "'b' begins at 4, expected 24: it overlaps"),
    "depth": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", "nested too deeply"),
    "just not too deep": (
        b'{"w":{"dtype":' + b"[" * 700 + b"]" * 700 + b',"shape":[],"data_offsets":[0,4]}}',
        b"",
        "dtype",
    ),
    "blocks not JSON": ({**blocks("[1]"), "w": entry("U8", (2, 34), (0, 68))}, b"\0" * 68, "miniphi.blocks"),
    "blocks entry": ({**blocks({"w": {"format": "NL4"}})}, b"", "expected exactly format and columns"),
    "blocks format": (
        {**blocks({"w": {"format": "F32", "columns": 64}})},
        b"",
        "has format 'F32', expected one of Q8_0",
    ),
    "blocks columns": ({**blocks({"w": {"format": "NL4", "columns": 96}})}, b"", "expected a multiple of 64 for NL4"),
    "blocks without tensor": ({**blocks({"w": NL4})}, b"", "names 'w', which the file does not hold"),
    "blocks dtype": ({**blocks({"w": NL4}), "w": entry()}, b"\0" * 24, "expected U8 [rows, 34]"),
    "blocks shape": (
        {**blocks({"w": NL4}), "w": entry("U8", (2, 33), (0, 66))},
        b"\0" * 66,
        "is 'U8' [2, 33], but miniphi.blocks says that it is NL4 with 64 columns",
    ),
    "blocks size": ({**blocks({"w": NL4}), "w": entry("U8", (2, 34), (0, 67))}, b"\0" * 67, "takes 68 bytes"),
    "blocks not listed": ({"w": entry("U8", (2, 34), (0, 68))}, b"\0" * 68, "has dtype 'U8', expected one of F32"),
    "digits": (b'{"a":' + b"9" * 10_000 + b"}", b"", "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused_by_name(tmp_path: Path, case: str) -> None:
    header, data, message = BAD_HEADERS[case]
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors") as caught:
        open_safetensors(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 100 << 20, 5 << 20])
def test_absurd_header_lengths_cost_nothing(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "bad.safetensors", b"{}", b"\0" * 100, length=length)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=f"its header has {length} bytes"):
        open_safetensors(path)
    assert time.perf_counter() - started < 0.1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("size", [0, 1, 7])
def test_tiny_files_are_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        open_safetensors(tmp_path / "x.safetensors")


def make_index(folder: Path, weight_map: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_index_that_contradicts_its_shards_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "one.safetensors", {"a": entry()}, b"\0" * 24)
    with pytest.raises(CheckpointError, match=r"two\.safetensors: no such file"):
        open_sharded_safetensors(make_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))
    with pytest.raises(CheckpointError, match=r"'b' should be in one\.safetensors, and is not there"):
        open_sharded_safetensors(make_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"}))
    write_raw(tmp_path / "two.safetensors", {"a": entry(), "b": entry(offsets=(24, 48))}, b"\0" * 48)
    with pytest.raises(CheckpointError, match=r"two\.safetensors holds 'a', which the index does not say"):
        open_sharded_safetensors(make_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "C:x.safetensors", "x.bin", "a\0.safetensors", 3],
)
def test_index_cannot_leave_its_folder(tmp_path: Path, name: Any) -> None:
    with pytest.raises(CheckpointError, match=r"expected the name of a \.safetensors file in the same folder"):
        open_sharded_safetensors(make_index(tmp_path, {"a": name}))


@pytest.mark.parametrize("value", [None, {}, [], "x"])
def test_index_without_a_map_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match="weight_map"):
        open_sharded_safetensors(make_index(tmp_path, value))


def test_saving_refuses_what_does_not_fit_and_leaves_nothing(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: is missing"):
        save_safetensors(tmp_path / "m", config, missing)
    with pytest.raises(CheckpointError, match="'extra': the configuration has no such tensor"):
        save_safetensors(tmp_path / "m", config, {**tensors, "extra": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"has shape \[3\], the configuration says \[64\]"):
        save_safetensors(tmp_path / "m", config, {**tensors, "model.norm.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match="plain file name"):
        save_safetensors(tmp_path / "m", config, tensors, extra_files={"../x": b""})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(StorageError, match="not an empty folder"):
        save_safetensors(tmp_path / "full", config, tensors)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes"]
