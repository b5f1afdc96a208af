"""Reader of GGUF files, versions 2 and 3, little-endian.

Owns the file format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): every count, length and offset is
checked against the file before anything is allocated. Knows no model: names are as in the file.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from miniphi.checkpoint.formats import Format, format_from_ggml_type
from miniphi.checkpoint.mapped_file import MappedFile, quoted
from miniphi.errors import CheckpointError, UnsupportedModelError

__all__ = ["DEFAULT_ALIGNMENT", "MAGIC", "VERSION", "GGUFFile", "GGUFTensor", "ValueType", "open_gguf"]

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32

# Limits of a genuine file, with room to spare: the largest vocabularies have some 260,000 tokens and 520,000 merges.
MAX_HEADER_BYTES = 128 << 20
MAX_ARRAY_ITEMS = 1 << 22
MAX_STRING_BYTES = 32 << 20
MAX_KEY_BYTES = 1 << 16  # the specification's limit
MAX_TENSOR_NAME_BYTES = 64  # the specification's limit
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16

_MIN_FIELD_BYTES = 13  # length of the key, type, one byte of value
_MIN_TENSOR_BYTES = 33  # length of the name, one dimension, type, offset, one byte of name
_LENGTH_BYTES = 8

# ggml types that exist and that miniphi does not read, for the message.
_OTHER_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class ValueType:
    """Type ids of metadata values."""

    UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)


_NUMBERS = {  # the codes mean the same to struct and to NumPy
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
_SCALARS = {value_type: struct.Struct("<" + code) for value_type, code in _NUMBERS.items()}
_U32 = _SCALARS[ValueType.UINT32]
_U64 = _SCALARS[ValueType.UINT64]


@dataclass(frozen=True, kw_only=True, eq=False)
class GGUFTensor:
    """Where one tensor lies. `shape` is rows first (GGUF writes columns first); `offset` is from the file's start."""

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows when all dimensions but the last are taken together; one for a vector."""
        return self.num_bytes // self.format.row_bytes(self.shape[-1])


@dataclass(frozen=True, kw_only=True, eq=False)
class GGUFFile:
    """The metadata and the tensor table of an open GGUF file. Arrays of the metadata are lists."""

    file: MappedFile
    metadata: Mapping[str, object]
    tensors: Mapping[str, GGUFTensor]

    def raw(self, tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor, uint8 [rows, row_bytes], read-only and still in the file."""
        view = self.file.data[tensor.offset : tensor.offset + tensor.num_bytes]
        return view.reshape(tensor.num_rows, -1)


def open_gguf(path: Path) -> GGUFFile:
    """Map a GGUF file and read its header. Raises CheckpointError or UnsupportedModelError naming the file and key."""
    file = MappedFile(path)
    try:
        return _HeaderReader(file).read()
    except BaseException:
        file.close()
        raise


class _HeaderReader:
    """A position in the header that never passes its end."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.path = file.path
        self.buffer = file.mapping
        self.limit = min(file.size, MAX_HEADER_BYTES)
        self.position = 0

    def read(self) -> GGUFFile:
        num_tensors, num_fields = self._read_counts()
        metadata: dict[str, object] = {}
        for _ in range(num_fields):
            key = self._string("a metadata key", MAX_KEY_BYTES)
            if key in metadata:
                raise CheckpointError(f"{self.path}: the metadata key {quoted(key)} appears twice")
            metadata[key] = self._value(key)
        alignment = self._check_alignment(metadata)
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        data_start = -(-self.position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for entry in entries:
            if entry.name in tensors:
                raise CheckpointError(f"{self.path}: the tensor {quoted(entry.name)} appears twice")
            tensors[entry.name] = self._place(entry, data_start, alignment)
        self._check_overlaps(tensors)
        return GGUFFile(file=self.file, metadata=metadata, tensors=tensors)

    def _read_counts(self) -> tuple[int, int]:
        if self.file.size < len(MAGIC) or self.buffer[: len(MAGIC)] != MAGIC:
            raise CheckpointError(f"{self.path}: does not begin with {MAGIC!r}; this is not a GGUF file")
        self.position = len(MAGIC)
        version = self._number(_U32, "the version")
        if version & 0xFFFF == 0:
            raise UnsupportedModelError(f"{self.path}: is a big-endian GGUF file; convert it to little-endian")
        if version not in (2, VERSION):
            raise UnsupportedModelError(f"{self.path}: is GGUF version {version}; versions 2 and 3 are supported")
        num_tensors = self._number(_U64, "the number of tensors")
        num_fields = self._number(_U64, "the number of metadata fields")
        if num_tensors * _MIN_TENSOR_BYTES + num_fields * _MIN_FIELD_BYTES > self.limit - self.position:
            raise CheckpointError(
                f"{self.path}: says that it has {num_tensors} tensors and {num_fields} metadata fields, which do not "
                f"fit into its {self.file.size} bytes; it is truncated or corrupt"
            )
        return num_tensors, num_fields

    def _take(self, num_bytes: int, what: str) -> int:
        """Advance over `num_bytes` and return where they begin."""
        start = self.position
        if num_bytes > self.limit - start:
            raise CheckpointError(
                f"{self.path}: {what} at byte {start} needs {num_bytes} bytes, and the header ends at {self.limit}; "
                "the file is truncated or corrupt"
            )
        self.position = start + num_bytes
        return start

    def _number(self, layout: struct.Struct, what: str) -> int:
        (value,) = layout.unpack_from(self.buffer, self._take(layout.size, what))
        return int(value)

    def _string(self, what: str, max_bytes: int) -> str:
        length = self._number(_U64, what)
        if length > max_bytes:
            raise CheckpointError(f"{self.path}: {what} has {length} bytes, expected at most {max_bytes}")
        start = self._take(length, what)
        try:
            return self.buffer[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8: {error}") from None

    def _value(self, key: str) -> object:
        what = f"the value of {quoted(key)}"
        value_type = self._number(_U32, what)
        if value_type == ValueType.STRING:
            return self._string(what, MAX_STRING_BYTES)
        if value_type == ValueType.ARRAY:
            return self._array(what)
        layout = _SCALARS.get(value_type)
        if layout is None:
            raise CheckpointError(f"{self.path}: {what} has the unknown type {value_type}")
        (value,) = layout.unpack_from(self.buffer, self._take(layout.size, what))
        return self._boolean(value, what) if value_type == ValueType.BOOL else value

    def _boolean(self, value: int, what: str) -> bool:
        if value > 1:
            raise CheckpointError(f"{self.path}: {what} is the truth value {value}, expected 0 or 1")
        return bool(value)

    def _array(self, what: str) -> list[object]:
        item_type = self._number(_U32, what)
        count = self._number(_U64, what)
        if item_type == ValueType.ARRAY:
            raise UnsupportedModelError(f"{self.path}: {what} is an array of arrays, which no supported model has")
        if count > MAX_ARRAY_ITEMS:
            raise CheckpointError(f"{self.path}: {what} has {count} items, expected at most {MAX_ARRAY_ITEMS}")
        if item_type == ValueType.STRING:
            return [*self._strings(count, what)]
        code = _NUMBERS.get(item_type)
        if code is None:
            raise CheckpointError(f"{self.path}: {what} is an array of the unknown type {item_type}")
        start = self._take(count * _SCALARS[item_type].size, what)
        items = self.file.data[start : self.position].view("<" + code)
        if item_type == ValueType.BOOL:
            return [self._boolean(item, what) for item in items.tolist()]
        return list(items.tolist())

    def _strings(self, count: int, what: str) -> list[str]:
        if count * _LENGTH_BYTES > self.limit - self.position:
            raise CheckpointError(f"{self.path}: {what} has {count} strings, which do not fit into the file")
        window = self.file.data[self.position : min(self.limit, self.position + count * _WINDOW_BYTES_PER_STRING)]
        found = split_short_strings(window, count)
        if found is not None:
            strings, num_bytes = found
            self.position += num_bytes
            return strings
        return [self._string(what, MAX_STRING_BYTES) for _ in range(count)]

    def _check_alignment(self, metadata: Mapping[str, object]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment is {quoted(alignment)}, expected a power of two from 8 to "
                f"{MAX_ALIGNMENT}"
            )
        return alignment

    def _tensor_entry(self) -> GGUFTensor:
        """Read one line of the tensor table; `offset` is still relative to the data section."""
        name = self._string("a tensor name", MAX_TENSOR_NAME_BYTES)
        where = f"tensor {quoted(name)}"
        num_dimensions = self._number(_U32, where)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(
                f"{self.path}: {where} has {num_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}"
            )
        sizes = [self._number(_U64, where) for _ in range(num_dimensions)]
        if 0 in sizes:
            raise CheckpointError(f"{self.path}: {where} has a dimension of size 0: {sizes}")
        ggml_type = self._number(_U32, where)
        offset = self._number(_U64, where)
        fmt = format_from_ggml_type(ggml_type)
        if fmt is None:
            shown = _OTHER_TYPES.get(ggml_type, f"of unknown type {ggml_type}")
            supported = ", ".join(each.name for each in Format if each.ggml_type is not None)
            raise UnsupportedModelError(f"{self.path}: {where} is {shown}; supported are {supported}")
        try:
            num_bytes = fmt.row_bytes(sizes[0])
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {where}: {error}") from None
        for size in sizes[1:]:
            num_bytes *= size
        return GGUFTensor(name=name, format=fmt, shape=tuple(sizes[::-1]), offset=offset, num_bytes=num_bytes)

    def _place(self, entry: GGUFTensor, data_start: int, alignment: int) -> GGUFTensor:
        where = f"{self.path}: tensor {quoted(entry.name)}"
        if entry.offset % alignment:
            raise CheckpointError(f"{where} lies at {entry.offset}, expected a multiple of {alignment}")
        offset = data_start + entry.offset
        if offset + entry.num_bytes > self.file.size:
            raise CheckpointError(
                f"{where} ends at byte {offset + entry.num_bytes}, but the file has {self.file.size}; it is truncated: "
                "fetch it again"
            )
        return GGUFTensor(
            name=entry.name, format=entry.format, shape=entry.shape, offset=offset, num_bytes=entry.num_bytes
        )

    def _check_overlaps(self, tensors: Mapping[str, GGUFTensor]) -> None:
        end = 0
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise CheckpointError(f"{self.path}: tensor {quoted(tensor.name)} overlaps another one")
            end = tensor.offset + tensor.num_bytes


_WINDOW_BYTES_PER_STRING = 32  # of an array of strings; vocabularies need 14 to 20, lengths included


def split_short_strings(window: npt.NDArray[np.uint8], count: int) -> tuple[list[str], int] | None:
    """Split `count` length-prefixed strings at once: the strings and the bytes they take.

    None if the quick way does not apply (a string is empty, longer than 255 bytes or holds a zero byte, is not UTF-8,
    or the window is too small); the caller then reads one string at a time. A vocabulary takes a quarter of the time
    this way. The method: a length below 256 is a byte followed by seven zeros, so all such places are found at once,
    then proven to be the real chain of lengths; with the first byte zeroed, eight zeros separate the strings.
    """
    if count == 0 or len(window) < _LENGTH_BYTES:
        return None
    zero = window == 0
    seven = zero[1:-6].copy()
    for shift in range(2, _LENGTH_BYTES):
        seven &= zero[shift : len(zero) - 7 + shift]
    starts = np.flatnonzero(seven)[:count]
    if len(starts) < count or starts[0] != 0:
        return None
    ends = starts + _LENGTH_BYTES + window[starts]
    end = int(ends[-1])
    if end > len(window) or not np.array_equal(ends[:-1], starts[1:]):
        return None
    text = window[:end].copy()
    text[starts] = 0
    if np.count_nonzero(text) != end - _LENGTH_BYTES * count:
        return None
    try:
        strings = text.tobytes().decode("utf-8").split("\0" * _LENGTH_BYTES)
    except UnicodeDecodeError:
        return None
    return strings[1:], end
