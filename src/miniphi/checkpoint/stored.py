"""What a checkpoint is once it is open: a configuration and tensors that still lie in the file.

Owns StoredTensor (a view), Checkpoint (all of them) and TensorSource (what a writer needs of a tensor). Knows no file
format.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from miniphi.checkpoint.formats import Format, dequantize
from miniphi.checkpoint.mapped_file import MappedFile
from miniphi.config import ModelConfig

__all__ = ["Checkpoint", "StoredTensor", "TensorSource", "TokenizerSource", "encode_floats"]

TokenizerSource: TypeAlias = (
    tuple[Literal["files"], Path, Mapping[str, object]] | tuple[Literal["gguf"], Mapping[str, object]]
)
"""Where the tokenizer is: ("files", tokenizer.json, tokenizer_config) or ("gguf", metadata)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensor:
    """One tensor as it lies in its file, under its Hugging Face name.

    Shapes: raw uint8 [rows, row_bytes], read-only (a vector is one row); row_order int32 [rows] or None.
    Logical row i is raw row `row_order[i]`: GGUF stores the q and k rows of `llama` models permuted, and every reader
    of this class sees Hugging Face order.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    raw: npt.NDArray[np.uint8]
    row_order: npt.NDArray[np.int32] | None = None
    file: MappedFile | None = field(default=None, repr=False)
    file_offset: int = field(default=0, repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes in its file."""
        return self.raw.size

    def to_float32(self) -> npt.NDArray[np.float32]:
        """Return the values, float32 of `shape`, in Hugging Face row order."""
        return dequantize(self.raw, self.format, row_order=self.row_order).reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return the raw bytes of logical rows start..stop, uint8 [stop - start, row_bytes]."""
        return self.raw[start:stop] if self.row_order is None else self.raw[self.row_order[start:stop]]

    def release_pages(self) -> None:
        """Drop the tensor's pages from memory; a later read fetches them from the file again."""
        if self.file is not None:
            self.file.release_pages(self.file_offset, self.num_bytes)


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorSource:
    """A tensor that a writer streams: `read_rows(start, stop)` returns raw bytes, uint8 [stop - start, row_bytes].

    Rows are in Hugging Face order; a vector is one row. `release` is called once the tensor has been written.
    """

    format: Format
    shape: tuple[int, ...]
    read_rows: Callable[[int, int], npt.NDArray[np.uint8]]
    release: Callable[[], None] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the tensor; one for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes in a file. Raises ValueError if a row is not a whole number of blocks."""
        return self.num_rows * self.format.row_bytes(self.shape[-1])

    @classmethod
    def from_stored(cls, tensor: StoredTensor) -> Self:
        """Copy a tensor of an open checkpoint as it is."""
        return cls(format=tensor.format, shape=tensor.shape, read_rows=tensor.read_rows, release=tensor.release_pages)

    @classmethod
    def from_floats(cls, values: npt.NDArray[np.floating], fmt: Format = Format.F32) -> Self:
        """Store an array as F32, F16 or BF16."""
        rows = values.reshape(1, -1) if values.ndim == 1 else values
        return cls(format=fmt, shape=values.shape, read_rows=lambda start, stop: encode_floats(rows[start:stop], fmt))

    @classmethod
    def from_bytes(cls, raw: npt.NDArray[np.uint8], fmt: Format, shape: tuple[int, ...]) -> Self:
        """Store bytes that are already in `fmt`, uint8 [rows, row_bytes]."""
        return cls(format=fmt, shape=shape, read_rows=lambda start, stop: raw[start:stop])


def encode_floats(values: npt.NDArray[np.floating], fmt: Format) -> npt.NDArray[np.uint8]:
    """Encode rows as F32, F16 or BF16 (nearest, ties to even; NaN stays NaN): [rows, n] -> uint8 [rows, bytes]."""
    rows = np.ascontiguousarray(values, dtype=np.float32)
    if fmt is Format.F32:
        return rows.view(np.uint8)
    if fmt is Format.F16:
        with np.errstate(over="ignore"):
            return rows.astype("<f2").view(np.uint8)
    if fmt is not Format.BF16:
        raise ValueError(f"expected F32, F16 or BF16, found {fmt.name}; use quantize_rows")
    bits = rows.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)  # rounding could carry a NaN over to infinity
    return np.where(np.isnan(rows), quiet, rounded).astype("<u2").view(np.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """An open model: configuration, tensors by Hugging Face name, and where its tokenizer is.

    `tensors` holds exactly the tensors that `config` asks for, in the order of the model; no `lm_head.weight` means
    that the embeddings are tied. `metadata` is the GGUF metadata, or the metadata of the safetensors file.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    tokenizer_source: TokenizerSource | None
    chat_template: str | None
    generation_eos_token_ids: tuple[int, ...]
    metadata: Mapping[str, object]
    files: tuple[MappedFile, ...] = field(default=(), repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in their files."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def close(self) -> None:
        """Unmap the files. Arrays taken from the tensors stay valid as long as they are referenced."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
