"""A packed model file: weights exactly as the kernels read them, so that a start maps them and copies nothing.

Owns the format, which belongs to one layout of the kernels (`kernels.layout_fingerprint`): a cache, and not a way
to pass models on. Knows nothing of what else lies in it (`attachments`) or when it is written.

    header       magic, format version, CRC-32 of the head, bytes of the JSON, of the head, of the file
    head         JSON (identity, configuration, where everything lies), then attachments and vectors
    matrices     from the next multiple of 2 MiB on, each a multiple of 64 bytes from the start

The CRC covers everything but the matrices: their bytes may be anything without doing harm, but for wrong numbers.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miniphi.atomic_write import atomic_file, check_free_space
from miniphi.checkpoint.names import expected_shapes
from miniphi.config import ModelConfig, RopeScaling
from miniphi.engine.weights import ModelWeights, assemble
from miniphi.errors import CheckpointError, UnsupportedModelError
from miniphi.kernels import Kind, MappedMatrices, PackedMatrix, layout_fingerprint

__all__ = ["PackedModel", "read_packed_file", "read_packed_identity", "write_packed_file"]

_MAGIC = b"miniphi\0"
_FORMAT = 1
_HEADER = struct.Struct("<8sIIQQQ")
_LINE = 64  # what the kernels align to
_HUGE_PAGE = 2 << 20
_MAX_HEAD_BYTES = 256 << 20
# Whole huge pages: what is written in them is cached in them, and read through a mapping at the full rate.
_CHUNK_BYTES = 4 * _HUGE_PAGE
_SPARE_DISK_BYTES = 1 << 30
# What reading a wrong description can raise; the checksum keeps all but a forged file from getting so far.
_WRONG = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, OSError)


@dataclass(frozen=True, kw_only=True)
class PackedModel:
    """What a packed file holds; the matrices of `weights` lie in the mapped file."""

    config: ModelConfig
    weights: ModelWeights
    attachments: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes of all matrices."""
        return self.weights.num_bytes


class _StoppedError(Exception):
    """The writer was told to stop."""


def write_packed_file(
    path: Path,
    config: ModelConfig,
    weights: ModelWeights,
    *,
    identity: Mapping[str, object],
    attachments: Mapping[str, bytes],
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Write a model, whole or not at all; return False if `should_stop` ended it, which is asked every 8 MiB.

    `identity` is JSON and says what the model was made from: only who asks for the same gets it back.
    Raises StorageError if the disk is full (1 GiB must stay free) or cannot be written.
    """
    offsets, num_matrix_bytes = _place([matrix.num_bytes for matrix in weights.matrices.values()], _LINE)
    head, json_bytes = _head(config, weights, offsets, identity, attachments)
    start = _round_up(_HEADER.size + len(head), _HUGE_PAGE)
    check_free_space(path.parent, start + num_matrix_bytes + _SPARE_DISK_BYTES)
    header = _HEADER.pack(_MAGIC, _FORMAT, zlib.crc32(head), json_bytes, len(head), start + num_matrix_bytes)
    try:
        with atomic_file(path, overwrite=True) as file:
            file.write(header + head)
            file.flush()
            pieces = (matrix.packed_bytes for matrix in weights.matrices.values())
            position = start
            for chunk in _chunks(pieces):
                if should_stop():
                    raise _StoppedError
                _write_at(file.fileno(), chunk, position)
                position += len(chunk)
    except _StoppedError:
        return False
    return True


def read_packed_file(path: Path, *, identity: Mapping[str, object]) -> PackedModel:
    """Map a file that was written for `identity` with the layout of these kernels.

    Raises CheckpointError if it is anything else, CapacityError without address space.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        description, head, num_bytes = _read_head(descriptor, path)
        if description.get("identity") != identity:
            raise CheckpointError(f"{path}: was written for another model")
        _check_layouts(description["layouts"], path)
        return _build(description, head, MappedMatrices(descriptor, num_bytes))
    except (*_WRONG, UnsupportedModelError) as error:
        raise CheckpointError(f"{path}: is not a packed model file of this version: {error}") from None
    finally:
        os.close(descriptor)


def read_packed_identity(path: Path) -> Mapping[str, object]:
    """Return what a packed file says it was made from. Raises CheckpointError if it is not one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            return dict(_read_head(descriptor, path)[0]["identity"])
        finally:
            os.close(descriptor)
    except _WRONG as error:
        raise CheckpointError(f"{path}: is not a packed model file of this version: {error}") from None


def _head(
    config: ModelConfig,
    weights: ModelWeights,
    offsets: list[int],
    identity: Mapping[str, object],
    attachments: Mapping[str, bytes],
) -> tuple[bytes, int]:
    """Return the head and the bytes of the JSON it begins with; offsets in it count from where their part begins."""
    parts = {**attachments, **{name: vector.tobytes() for name, vector in weights.vectors.items()}}
    starts, _ = _place([len(part) for part in parts.values()], _LINE)
    kinds = sorted({Kind(matrix.kind) for matrix in weights.matrices.values()})
    description = {
        "identity": identity,
        "config": asdict(config),
        "layouts": {kind.name: layout_fingerprint(kind) for kind in kinds},
        "matrices": {
            name: (Kind(matrix.kind).name, matrix.rows, matrix.depth, offset)
            for (name, matrix), offset in zip(weights.matrices.items(), offsets, strict=True)
        },
        "parts": {name: (start, len(part)) for (name, part), start in zip(parts.items(), starts, strict=True)},
        "attachments": list(attachments),
    }
    text = json.dumps(description).encode()
    text += b" " * (_round_up(len(text), _LINE) - len(text))
    head = bytearray(text)
    for part in parts.values():
        head += part
        head += bytes(_round_up(len(head), _LINE) - len(head))
    return bytes(head), len(text)


def _place(sizes: list[int], alignment: int) -> tuple[list[int], int]:
    """Return where things of these sizes begin when they lie aligned one behind the other, and where the last ends."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end = _round_up(end + size, alignment)
    return offsets, end


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _chunks(pieces: Iterator[NDArray[np.uint8]]) -> Iterator[memoryview]:
    """Gather aligned pieces into chunks of one size, but for the last; a chunk is valid until the next."""
    buffer = bytearray(_CHUNK_BYTES)
    view, filled = memoryview(buffer), 0
    for piece in pieces:
        done = 0
        while done < len(piece):
            count = min(_CHUNK_BYTES - filled, len(piece) - done)
            view[filled : filled + count] = piece[done : done + count].data
            filled, done = filled + count, done + count
            if filled == _CHUNK_BYTES:
                yield view
                filled = 0
        aligned = _round_up(filled, _LINE)
        view[filled:aligned] = bytes(aligned - filled)
        filled = aligned % _CHUNK_BYTES
        if aligned == _CHUNK_BYTES:
            yield view
    if filled:
        yield view[:filled]


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written


def _read_head(descriptor: int, path: Path) -> tuple[dict[str, Any], bytes, int]:
    """Return the description, the head and the file's size, checked against the checksum and the true size."""
    size = os.fstat(descriptor).st_size
    header = os.pread(descriptor, _HEADER.size, 0)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise CheckpointError(f"{path}: is not a packed model file")
    _, version, checksum, json_bytes, head_bytes, file_bytes = _HEADER.unpack(header)
    if version != _FORMAT:
        raise CheckpointError(f"{path}: has format {version}, expected {_FORMAT}")
    if file_bytes != size or head_bytes > min(size, _MAX_HEAD_BYTES) or json_bytes > head_bytes:
        raise CheckpointError(f"{path}: has {size} bytes, expected {file_bytes}; it is truncated or corrupt")
    head = os.pread(descriptor, head_bytes, _HEADER.size)
    if zlib.crc32(head) != checksum:
        raise CheckpointError(f"{path}: its checksum is wrong; it is corrupt")
    description = json.loads(head[:json_bytes])
    # Offsets count from where their part begins, which only the sizes in the header tell.
    description["matrices_start"] = _round_up(_HEADER.size + head_bytes, _HUGE_PAGE)
    return description, head[json_bytes:], size


def _check_layouts(layouts: Mapping[str, int], path: Path) -> None:
    for name, fingerprint in layouts.items():
        if name not in Kind.__members__ or layout_fingerprint(Kind[name]) != fingerprint:
            raise CheckpointError(f"{path}: its {name} matrices have another layout than these kernels'")


def _build(description: dict[str, Any], parts: bytes, file: MappedMatrices) -> PackedModel:
    config = _config(description["config"])
    shapes = expected_shapes(config)

    def part(name: str) -> bytes:
        start, size = description["parts"][name]
        if not 0 <= start <= start + size <= len(parts):
            raise ValueError(f"{name} lies outside the head")
        return parts[start : start + size]

    def matrix(name: str) -> PackedMatrix:
        kind, rows, depth, offset = description["matrices"][name]
        if kind not in description["layouts"] or (rows, depth) != shapes[name]:
            raise ValueError(f"{name} is {kind} [{rows}, {depth}], expected {list(shapes[name])}")
        return file.matrix(Kind[kind], rows, depth, description["matrices_start"] + offset)

    def vector(name: str) -> NDArray[np.float32]:
        values = np.frombuffer(part(name), np.float32)
        if values.shape != shapes[name]:
            raise ValueError(f"{name} has shape {values.shape}, expected {shapes[name]}")
        return values

    weights = assemble(config, matrix, vector)
    return PackedModel(
        config=config, weights=weights, attachments={name: part(name) for name in description["attachments"]}
    )


def _config(fields: dict[str, Any]) -> ModelConfig:
    rope = fields["rope_scaling"]
    if rope is not None:
        factors = {name: tuple(rope[name]) for name in ("long_factor", "short_factor")}
        rope = RopeScaling(**{**rope, **factors})
    return ModelConfig(**{**fields, "rope_scaling": rope, "eos_token_ids": tuple(fields["eos_token_ids"])})
