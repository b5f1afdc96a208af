import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniphi.checkpoint import Format, open_gguf
from miniphi.checkpoint.gguf import split_short_strings
from miniphi.errors import CheckpointError, MiniphiError, UnsupportedModelError
from tests.checkpoint import gguf_files as g
from tests.shared_data import shared_path, smollm2_gguf

NAME = g.field("general.name", g.STRING, "x")


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_kind_of_value(tmp_path: Path, version: int) -> None:
    numbers = {
        g.UINT8: 200,
        g.INT8: -100,
        g.UINT16: 60000,
        g.INT16: -30000,
        g.UINT32: 1 << 31,
        g.INT32: -5,
        g.FLOAT32: 0.5,
        g.UINT64: 1 << 63,
        g.INT64: -(1 << 62),
        g.FLOAT64: 0.1,
    }
    fields = [g.field(f"n{kind}", kind, value) for kind, value in numbers.items()]
    fields += [g.array(f"a{kind}", kind, [value, 0, 1]) for kind, value in numbers.items()]
    fields += [g.field("yes", g.BOOL, 1), g.field("text", g.STRING, "héllo"), g.array("flags", g.BOOL, [1, 0])]
    fields += [g.array("words", g.STRING, ["a", "", "日本", "x" * 300]), g.array("none", g.STRING, [])]
    fields += [g.array("no numbers", g.FLOAT32, [])]
    metadata = open_gguf(g.write_gguf_bytes(tmp_path / "x.gguf", fields, version=version)).metadata
    for kind, value in numbers.items():
        assert metadata[f"n{kind}"] == value
        assert metadata[f"a{kind}"] == [value, 0, 1]
    assert metadata["yes"] is True
    assert metadata["text"] == "héllo"
    assert metadata["flags"] == [True, False]
    assert metadata["words"] == ["a", "", "日本", "x" * 300]
    assert metadata["none"] == []
    assert metadata["no numbers"] == []
    assert len(metadata) == 2 * len(numbers) + 6


def test_reads_tensors_where_they_lie(tmp_path: Path) -> None:
    first, second = np.arange(6, dtype="<f4").tobytes(), np.arange(34, dtype=np.uint8).tobytes()
    tensors = [g.tensor("a", [3, 2]), g.tensor("b", [32], Format.Q8_0.ggml_type, 64)]
    fields = [g.field("general.alignment", g.UINT32, 64)]
    path = g.write_gguf_bytes(tmp_path / "x.gguf", fields, tensors, first.ljust(64, b"\0") + second, alignment=64)
    file = open_gguf(path)
    assert file.tensors["a"].shape == (2, 3)
    assert file.tensors["b"].format is Format.Q8_0
    np.testing.assert_array_equal(file.raw(file.tensors["a"]).view("<f4"), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(file.raw(file.tensors["b"])[0], np.arange(34))


def case(*fields: bytes, tensors: tuple[bytes, ...] = (), data: bytes = b"\0" * 4096, **options: Any) -> dict[str, Any]:
    return {"fields": list(fields), "tensors": list(tensors), "data": data, **options}


CORRUPT = {
    "twice": (case(NAME, NAME), "'general.name' appears twice"),
    "value type": (case(g.field("k", 13, b"\0" * 8)), "'k' has the unknown type 13"),
    "item type": (case(g.array("k", 99, [b"\0"])), "an array of the unknown type 99"),
    "truth": (case(g.field("k", g.BOOL, 2)), "is the truth value 2"),
    "truths": (case(g.array("k", g.BOOL, [0, 3])), "is the truth value 3"),
    "key": (case(g.field(b"\xff", g.UINT8, 1)), "not UTF-8"),
    "text": (case(g.field("k", g.STRING, g.text(b"\xff\xfe"))), "the value of 'k' is not UTF-8"),
    "words": (case(g.array("k", g.STRING, [g.text(b"a"), g.text(b"\xc3")])), "the value of 'k' is not UTF-8"),
    "key length": (case(struct.pack("<Q", 1 << 60)), "a metadata key has 1152921504606846976 bytes"),
    "text length": (case(g.field("k", g.STRING, struct.pack("<Q", 1 << 60))), "has 1152921504606846976 bytes"),
    "text end": (case(g.field("k", g.STRING, struct.pack("<Q", 1 << 20))), "truncated or corrupt"),
    "items": (case(g.array("k", g.FLOAT32, [], count=1 << 60)), "has 1152921504606846976 items"),
    "items end": (case(g.array("k", g.FLOAT64, [], count=1 << 20)), "truncated or corrupt"),
    "strings": (case(g.array("k", g.STRING, [], count=1 << 21)), "strings, which do not fit"),
    "strings end": (case(g.array("k", g.STRING, [b"\xff" * 8], count=2)), "has 18446744073709551615 bytes"),
    "fields": (case(counts=(0, 1 << 60)), "do not fit into its"),
    "tensors": (case(counts=(1 << 60, 0)), "do not fit into its"),
    "alignment": (case(g.field("general.alignment", g.UINT32, 48)), "general.alignment is 48"),
    "no alignment": (case(g.field("general.alignment", g.UINT32, 0)), "general.alignment is 0"),
    "alignment type": (case(g.field("general.alignment", g.STRING, "32")), "general.alignment is '32'"),
    "tensor twice": (case(tensors=(g.tensor("a", [8]), g.tensor("a", [8], offset=32))), "tensor 'a' appears twice"),
    "tensor name": (case(tensors=(g.tensor("a" * 65, [8]),)), "a tensor name has 65 bytes"),
    "dimensions": (case(tensors=(g.tensor("a", [1] * 5),)), "'a' has 5 dimensions"),
    "many dimensions": (case(tensors=(g.tensor("a", [1], num_dimensions=1 << 31),)), "has 2147483648 dimensions"),
    "no dimensions": (case(tensors=(g.tensor("a", []),)), "has 0 dimensions"),
    "empty": (case(tensors=(g.tensor("a", [8, 0]),)), "dimension of size 0"),
    "blocks": (case(tensors=(g.tensor("a", [33, 2], 2),)), "'a': Q4_0 needs a multiple of 32 columns, found 33"),
    "offset": (case(tensors=(g.tensor("a", [8], offset=4),)), "lies at 4, expected a multiple of 32"),
    "outside": (case(tensors=(g.tensor("a", [8], offset=1 << 40),)), "it is truncated"),
    "too large": (case(tensors=(g.tensor("a", [1 << 62, 1 << 62]),)), "it is truncated"),
    "overlap": (case(tensors=(g.tensor("a", [16]), g.tensor("b", [8], offset=32))), "tensor 'b' overlaps"),
}  # fmt: skip

UNSUPPORTED = {
    "version 1": (case(version=1), "GGUF version 1"),
    "version 4": (case(version=4), "GGUF version 4"),
    "big endian": (case(version=3 << 24), "big-endian"),
    "nested": (case(g.array("k", g.ARRAY, [b"\0" * 12])), "array of arrays"),
    "tensor type": (case(tensors=(g.tensor("w", [256], 10),)), "tensor 'w' is Q2_K; supported are F32, F16"),
    "unknown type": (case(tensors=(g.tensor("w", [256], 12345),)), "is of unknown type 12345"),
}


@pytest.mark.parametrize("name", [*CORRUPT, *UNSUPPORTED])
def test_bad_files_are_refused_quickly_and_by_name(tmp_path: Path, name: str) -> None:
    options, message = (CORRUPT | UNSUPPORTED)[name]
    path = g.write_gguf_bytes(tmp_path / "bad.gguf", **options)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(UnsupportedModelError if name in UNSUPPORTED else CheckpointError, match=r"bad\.gguf") as caught:
        open_gguf(path)
    assert message in str(caught.value)
    assert time.perf_counter() - started < 0.2
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"GGUF", b"GGUF\3\0\0\0", b"GGUF" + b"\0" * 19, b"PK\3\4" + b"\0" * 99]
)
def test_stubs_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(MiniphiError, match=r"x\.gguf"):
        open_gguf(tmp_path / "x.gguf")


def test_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_gguf(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        open_gguf(tmp_path / "missing.gguf")


@settings(max_examples=200, deadline=None)
@given(strings=st.lists(st.text(max_size=300), min_size=1, max_size=30), tail=st.binary(max_size=40))
def test_the_quick_way_with_strings_is_right_or_declines(strings: list[str], tail: bytes) -> None:
    encoded = b"".join(g.text(string) for string in strings)
    found = split_short_strings(np.frombuffer(encoded + tail, dtype=np.uint8), len(strings))
    assert found in (None, (strings, len(encoded)))
    if all(0 < len(string.encode()) < 256 and "\0" not in string for string in strings):
        assert found is not None


@settings(max_examples=300, deadline=None)
@given(data=st.lists(st.sampled_from([0, 0, 0, 0, 1, 2, 65, 255]), max_size=60), count=st.integers(0, 5))
def test_the_quick_way_with_garbage_agrees_with_one_at_a_time(data: list[int], count: int) -> None:
    found = split_short_strings(np.array(data, dtype=np.uint8), count)
    if found is None:
        return
    position, expected = 0, []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", bytes(data), position)
        expected.append(bytes(data)[position + 8 : position + 8 + length].decode())
        position += 8 + length
    assert found == (expected, position)


def check_against_the_reference(path: Path) -> None:
    import gguf

    ours, reference = open_gguf(path), gguf.GGUFReader(path)
    fields = {key: value for key, value in reference.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, value in fields.items():
        assert ours.metadata[key] == value.contents()
    assert list(ours.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        entry = ours.tensors[tensor.name]
        assert (entry.offset, entry.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert entry.shape == tuple(tensor.shape.tolist()[::-1])


def test_phi3_vocabulary_is_read_as_the_reference_reads_it() -> None:
    check_against_the_reference(shared_path("tokenizer/ggml-vocab-phi-3.gguf"))


def test_smollm2_is_read_as_the_reference_reads_it() -> None:
    check_against_the_reference(smollm2_gguf())
