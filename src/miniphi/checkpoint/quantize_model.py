"""A whole checkpoint -> a quantised GGUF file, one tensor at a time.

Owns which tensor becomes what, the report and the guard against overwriting. The arithmetic is in quantize.py, the
file in gguf_writer.py.
"""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from miniphi.checkpoint.formats import Format, dequantize
from miniphi.checkpoint.gguf_tokenizer import tokenizer_metadata
from miniphi.checkpoint.gguf_writer import write_gguf
from miniphi.checkpoint.names import EMBEDDINGS, LM_HEAD
from miniphi.checkpoint.quantize import QUANTIZABLE, QuantizationError, quantize_rows
from miniphi.checkpoint.stored import Checkpoint, StoredTensor, TensorSource, encode_floats
from miniphi.errors import CheckpointError

__all__ = ["QuantizeReport", "Scheme", "TensorReport", "quantize_checkpoint", "scheme_format"]

Scheme: TypeAlias = Literal["q8", "q4"]
"""q8: all matrices Q8_0. q4: Q4_0, with embeddings and lm_head in Q8_0. Vectors are F32 in both."""

_MAX_THREADS = 16
_WRITTEN_ANEW = {
    f"general.{key}" for key in ("architecture", "type", "name", "file_type", "quantization_version", "alignment")
}


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """What became of one tensor; the errors compare with the source as it was stored."""

    name: str
    source_format: Format
    target_format: Format
    relative_error: float
    max_absolute_error: float


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """What became of a checkpoint. Bytes are those of the tensors."""

    tensors: tuple[TensorReport, ...]
    source_bytes: int
    target_bytes: int
    num_values: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per value of the new file, scales included."""
        return 8 * self.target_bytes / self.num_values


def scheme_format(scheme: Scheme, name: str, num_dimensions: int) -> Format:
    """Return the format that a scheme stores a tensor in."""
    if num_dimensions == 1:
        return Format.F32
    return Format.Q4_0 if scheme == "q4" and name not in (EMBEDDINGS, LM_HEAD) else Format.Q8_0


def quantize_checkpoint(
    source: Checkpoint,
    destination: Path,
    *,
    scheme: Scheme,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    num_threads: int | None = None,
    on_progress: Callable[[TensorReport, float], None] | None = None,
) -> QuantizeReport:
    """Write `source` as a quantised GGUF file, with its tokenizer and chat template.

    `importance` gives, for a tensor, the weight of each column's squared error [columns]. `name` becomes
    `general.name`. `on_progress` is called after each tensor with its report and the fraction of bytes done. Memory
    stays bounded by a few chunks of rows. The file appears complete or not at all.

    Raises CheckpointError if the destination is the source, a tensor holds values that are not finite, or its rows do
    not divide into blocks; StorageError if the destination exists (unless overwrite) or the disk is full.
    """
    if scheme not in ("q8", "q4"):
        raise CheckpointError(f"scheme is {scheme!r}, expected 'q8' or 'q4'")
    _check_destination(source, destination)
    threads = num_threads or min(os.cpu_count() or 1, _MAX_THREADS)
    jobs = {
        key: _Job(tensor, scheme_format(scheme, key, len(tensor.shape)), (importance or {}).get(key))
        for key, tensor in source.tensors.items()
    }
    if unknown := set(importance or {}) - set(jobs):
        raise CheckpointError(f"importance: {min(unknown)!r} is not a tensor of the model")
    reports: list[TensorReport] = []
    total, done = source.num_bytes, 0

    def finish(key: str) -> None:
        nonlocal done
        done += source.tensors[key].num_bytes
        reports.append(jobs[key].report())
        if on_progress is not None:
            on_progress(reports[-1], done / total)

    write_gguf(
        destination,
        source.config,
        {key: job.source() for key, job in jobs.items()},
        tokenizer_metadata=tokenizer_metadata(source),
        general_metadata=_carried_metadata(source),
        name=name or _model_name(source),
        overwrite=overwrite,
        num_threads=threads,
        on_tensor=finish,
    )
    return QuantizeReport(
        tensors=tuple(reports),
        source_bytes=total,
        target_bytes=sum(job.source().num_bytes for job in jobs.values()),
        num_values=sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values()),
    )


def _check_destination(source: Checkpoint, destination: Path) -> None:
    read = [source.path, *(file.path for file in source.files)]
    if destination.exists() and any(path.exists() and destination.samefile(path) for path in read):
        raise CheckpointError(f"{destination}: is the model that would be read; choose another name")
    if not destination.parent.is_dir():
        raise CheckpointError(f"{destination}: the folder {destination.parent} does not exist")


def _carried_metadata(source: Checkpoint) -> dict[str, object]:
    """Return what a GGUF source says about its origin: author, licence, languages."""
    own = {key: value for key, value in source.metadata.items() if key.startswith("general.")}
    return {key: value for key, value in own.items() if key not in _WRITTEN_ANEW}


def _model_name(source: Checkpoint) -> str:
    name = source.metadata.get("general.name")
    if isinstance(name, str):
        return name
    path = source.path.resolve()
    return path.name if path.is_dir() else path.stem


class _Job:
    """One tensor on its way to its new format; sums the error of all its chunks, from several threads."""

    def __init__(self, tensor: StoredTensor, target: Format, importance: npt.NDArray[np.float32] | None) -> None:
        self.tensor = tensor
        self.target = target
        self.importance = importance
        self.error = QuantizationError()
        self.lock = threading.Lock()

    def source(self) -> TensorSource:
        if self.tensor.format is self.target:
            return TensorSource.from_stored(self.tensor)
        return TensorSource(
            format=self.target, shape=self.tensor.shape, read_rows=self._read_rows, release=self.tensor.release_pages
        )

    def _read_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        values = dequantize(self.tensor.read_rows(start, stop), self.tensor.format)
        if self.target not in QUANTIZABLE:
            return encode_floats(values, self.target)
        try:
            raw, error = quantize_rows(values, self.target, importance=self.importance)
        except CheckpointError as problem:
            raise CheckpointError(f"{self.tensor.name}: {problem}") from None
        with self.lock:
            self.error += error
        return raw

    def report(self) -> TensorReport:
        return TensorReport(
            name=self.tensor.name,
            source_format=self.tensor.format,
            target_format=self.target,
            relative_error=self.error.relative,
            max_absolute_error=self.error.max_absolute,
        )
