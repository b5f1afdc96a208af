"""Reader of safetensors files, one or sharded.

Owns the file format (https://huggingface.co/docs/safetensors, "Format"): every number in a header is checked before
it is used, and the byte buffer must be indexed completely, without overlaps or holes. Knows no model.

Quantised tensors are U8 arrays [rows, bytes of a row], which any reader of the format can list. What they are stands in
the metadata under BLOCKS_KEY, as JSON: {tensor name: {"format": name of a Format, "columns": values of a row}}.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from miniphi.checkpoint.formats import Format
from miniphi.checkpoint.mapped_file import MappedFile, quoted
from miniphi.checkpoint.stored import StoredTensor
from miniphi.checkpoint.strict_json import parse_json_object, read_json_object
from miniphi.errors import CheckpointError

__all__ = ["BLOCKS_KEY", "INDEX_NAME", "SINGLE_NAME", "SafetensorsFile", "open_safetensors", "open_sharded_safetensors"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
BLOCKS_KEY = "miniphi.blocks"
"""Key of `__metadata__` that says which U8 tensors are quantised blocks."""

# The reference implementation allows 100 MB. The header of a 14 B model has 0.04 MB, and parsed JSON can take twenty
# times the memory of its text.
MAX_HEADER_BYTES = 4 << 20
MAX_DIMENSIONS = 8
MAX_SHARDS = 4096

_LENGTH = struct.Struct("<Q")
_DTYPES = {"F32": Format.F32, "F16": Format.F16, "BF16": Format.BF16}
_BLOCK_DTYPE = "U8"
_BLOCK_FORMATS = {fmt.name: fmt for fmt in Format if fmt.block_size > 1}


@dataclass(frozen=True, kw_only=True, eq=False)
class SafetensorsFile:
    """The tensors of one or several safetensors files."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    files: tuple[MappedFile, ...]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
    format: Format
    shape: tuple[int, ...]
    begin: int
    end: int


def open_safetensors(path: Path) -> SafetensorsFile:
    """Map one safetensors file. Raises CheckpointError naming the file and the tensor."""
    file = MappedFile(path)
    try:
        return _parse(file)
    except BaseException:
        file.close()
        raise


def open_sharded_safetensors(index_path: Path) -> SafetensorsFile:
    """Map all shards that an index file lists. Raises CheckpointError naming the file and the tensor."""
    weight_map = _read_weight_map(index_path)
    shards: dict[str, SafetensorsFile] = {}
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    files: list[MappedFile] = []
    try:
        for shard_name in dict.fromkeys(weight_map.values()):
            shard = open_safetensors(index_path.parent / shard_name)
            files.extend(shard.files)
            shards[shard_name] = shard
            metadata.update(shard.metadata)
            for name in shard.tensors:
                if weight_map.get(name) != shard_name:
                    raise CheckpointError(
                        f"{index_path}: {shard_name} holds {quoted(name)}, which the index does not say"
                    )
        for name, shard_name in weight_map.items():
            if name not in shards[shard_name].tensors:
                raise CheckpointError(f"{index_path}: {quoted(name)} should be in {shard_name}, and is not there")
            tensors[name] = shards[shard_name].tensors[name]
    except BaseException:
        tensors.clear()
        shards.clear()
        for file in files:
            file.close()
        raise
    return SafetensorsFile(tensors=tensors, metadata=metadata, files=tuple(files))


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path, max_bytes=MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected an object `weight_map` that maps tensor names to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_file_name(shard):
            raise CheckpointError(
                f"{path}: {quoted(name)} is mapped to {quoted(shard)}; expected the name of a .safetensors file in the "
                "same folder"
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise CheckpointError(f"{path}: lists more than {MAX_SHARDS} files")
    return weight_map


def _is_plain_file_name(name: str) -> bool:
    return name.endswith(".safetensors") and name.isprintable() and not any(mark in name for mark in "/\\:")


def _parse(file: MappedFile) -> SafetensorsFile:
    header, data_start = _read_header(file)
    metadata = _check_metadata(header.pop("__metadata__", {}), file.path)
    blocks = _read_blocks(metadata, file.path)
    if unknown := sorted(set(blocks) - set(header)):
        raise CheckpointError(f"{file.path}: {BLOCKS_KEY} names {quoted(unknown[0])}, which the file does not hold")
    entries = [_check_entry(name, value, blocks.get(name), file.path) for name, value in header.items()]
    _check_layout(entries, file.size - data_start, file.path)
    tensors = {entry.name: _stored_tensor(entry, file, data_start) for entry in entries}
    return SafetensorsFile(tensors=tensors, metadata=metadata, files=(file,))


def _read_header(file: MappedFile) -> tuple[dict[str, object], int]:
    """Return the parsed header and the offset of the byte buffer."""
    if file.size < _LENGTH.size:
        raise CheckpointError(f"{file.path}: has {file.size} bytes; a safetensors file has at least {_LENGTH.size}")
    (length,) = _LENGTH.unpack_from(file.mapping)
    data_start = _LENGTH.size + length
    if length > MAX_HEADER_BYTES or data_start > file.size:
        raise CheckpointError(
            f"{file.path}: says that its header has {length} bytes; the file has {file.size} and the limit is "
            f"{MAX_HEADER_BYTES}. It is truncated or not a safetensors file"
        )
    text = file.mapping[_LENGTH.size : data_start]
    if not text.startswith(b"{"):
        raise CheckpointError(f"{file.path}: the header does not begin with '{{'; this is not a safetensors file")
    return parse_json_object(text, source=f"{file.path}: header"), data_start


def _check_metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{path}: expected `__metadata__` to map strings to strings")
    return value


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    format: Format
    columns: int


def _read_blocks(metadata: Mapping[str, str], path: Path) -> dict[str, _Blocks]:
    """Return what the metadata says about quantised tensors, by name."""
    where = f"{path}: {BLOCKS_KEY}"
    listed = parse_json_object(metadata.get(BLOCKS_KEY, "{}").encode(), source=where)
    blocks = {}
    for name, value in listed.items():
        if not isinstance(value, dict) or set(value) != {"format", "columns"}:
            raise CheckpointError(
                f"{where}: {quoted(name)}: expected exactly format and columns, found {quoted(value)}"
            )
        fmt = _BLOCK_FORMATS.get(value["format"]) if isinstance(value["format"], str) else None
        if fmt is None:
            raise CheckpointError(
                f"{where}: {quoted(name)} has format {quoted(value['format'])}, expected one of "
                f"{', '.join(_BLOCK_FORMATS)}"
            )
        if not _is_list_of_sizes([value["columns"]]) or value["columns"] % fmt.block_size:
            raise CheckpointError(
                f"{where}: {quoted(name)} has {quoted(value['columns'])} columns, expected a multiple of "
                f"{fmt.block_size} for {fmt.name}"
            )
        blocks[name] = _Blocks(format=fmt, columns=value["columns"])
    return blocks


def _check_entry(name: str, value: object, blocks: _Blocks | None, path: Path) -> _Entry:
    where = f"{path}: tensor {quoted(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected exactly dtype, shape and data_offsets, found {quoted(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not _is_list_of_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: has shape {quoted(shape)}, expected up to {MAX_DIMENSIONS} whole numbers")
    if not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: has data_offsets {quoted(offsets)}, expected two whole numbers")
    if blocks is None:
        fmt = _DTYPES.get(dtype) if isinstance(dtype, str) else None
        if fmt is None:
            raise CheckpointError(f"{where}: has dtype {quoted(dtype)}, expected one of {', '.join(_DTYPES)}")
        num_bytes, logical_shape = fmt.block_bytes, tuple(shape)
    else:
        fmt = blocks.format
        row_bytes = fmt.row_bytes(blocks.columns)
        if dtype != _BLOCK_DTYPE or len(shape) != 2 or shape[1] != row_bytes:
            raise CheckpointError(
                f"{where}: is {quoted(dtype)} {quoted(shape)}, but {BLOCKS_KEY} says that it is {fmt.name} with "
                f"{blocks.columns} columns: expected {_BLOCK_DTYPE} [rows, {row_bytes}]"
            )
        num_bytes, logical_shape = 1, (shape[0], blocks.columns)
    for size in shape:
        num_bytes *= size
    begin, end = offsets
    if end - begin != num_bytes:
        raise CheckpointError(
            f"{where}: {dtype} {quoted(shape)} takes {num_bytes} bytes, but data_offsets give it {end - begin}"
        )
    return _Entry(name=name, format=fmt, shape=logical_shape, begin=begin, end=end)


def _is_list_of_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(entries: list[_Entry], buffer_bytes: int, path: Path) -> None:
    """Require that the entries cover the buffer exactly, as the format demands."""
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            problem = "overlaps another tensor" if entry.begin < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {quoted(entry.name)} begins at {entry.begin}, expected {position}: it {problem}"
            )
        position = entry.end
    if position != buffer_bytes:
        raise CheckpointError(
            f"{path}: the tensors take {position} bytes, but the file holds {buffer_bytes} bytes of them; it is "
            "truncated or has something appended"
        )


def _stored_tensor(entry: _Entry, file: MappedFile, data_start: int) -> StoredTensor:
    begin, end = data_start + entry.begin, data_start + entry.end
    num_rows = entry.shape[0] if len(entry.shape) > 1 and end > begin else 1
    return StoredTensor(
        name=entry.name,
        format=entry.format,
        shape=entry.shape,
        raw=file.data[begin:end].reshape(num_rows, (end - begin) // num_rows),
        file=file,
        file_offset=begin,
    )
