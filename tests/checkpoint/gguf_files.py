"""A deliberately naive writer of GGUF bytes, right or wrong, for the tests of the reader."""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(key: str | bytes, kind: int, value: Any) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload(kind, value)


def payload(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return text(value) if kind == STRING else struct.pack("<" + CODES[kind], value)


def array(key: str, kind: int, items: Iterable[Any], *, count: int | None = None) -> bytes:
    data = [payload(kind, item) for item in items]
    head = struct.pack("<IIQ", ARRAY, kind, len(data) if count is None else count)
    return text(key) + head + b"".join(data)


def tensor(name: str, sizes: list[int], kind: int = 0, offset: int = 0, *, num_dimensions: int | None = None) -> bytes:
    count = len(sizes) if num_dimensions is None else num_dimensions
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, kind, offset)


def write_gguf_bytes(
    path: Path,
    fields: list[bytes],
    tensors: list[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> Path:
    num_tensors, num_fields = counts or (len(tensors), len(fields))
    header = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields) + b"".join(fields) + b"".join(tensors)
    path.write_bytes(header + b"\0" * (-len(header) % alignment) + data)
    return path
