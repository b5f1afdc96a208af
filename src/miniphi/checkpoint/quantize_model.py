"""A whole checkpoint -> a quantised GGUF file or folder, one tensor at a time.

Owns which tensor becomes what, the report and the guard against overwriting. The arithmetic is in quantize.py, the
files in gguf_writer.py and safetensors_writer.py.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from miniphi.atomic_write import check_new_file, check_new_folder
from miniphi.checkpoint.formats import Format, dequantize
from miniphi.checkpoint.gguf_tokenizer import tokenizer_metadata
from miniphi.checkpoint.gguf_writer import metadata_gguf, write_gguf
from miniphi.checkpoint.hf_folder import TOKENIZER_GGUF
from miniphi.checkpoint.names import EMBEDDINGS, LM_HEAD
from miniphi.checkpoint.quantize import QUANTIZABLE, QuantizationError, quantize_rows
from miniphi.checkpoint.safetensors_writer import save_safetensors
from miniphi.checkpoint.stored import Checkpoint, StoredTensor, TensorSource, encode_floats
from miniphi.errors import CheckpointError

__all__ = [
    "Prepared",
    "QuantizeReport",
    "Scheme",
    "TensorReport",
    "check_destination",
    "quantize_checkpoint",
    "resolve_scheme",
    "scheme_format",
]

Scheme: TypeAlias = Literal["q8", "q4", "q4m", "q4_0", "iq4_nl", "nl4", "nl4m"]
"""What matrices become; embeddings and lm_head become Q8_0 in every scheme, and vectors F32.

q8: Q8_0. q4, q4m: the 4-bit format of the destination, see `resolve_scheme`. The others are names of formats. With an m
at its end, a scheme keeps 8 bits for more matrices, see `is_sensitive`.
"""

_MATRIX_FORMATS: dict[str, Format] = {
    "q8": Format.Q8_0,
    "q4": Format.Q4_0,
    "q4_0": Format.Q4_0,
    "iq4_nl": Format.IQ4_NL,
    "nl4": Format.NL4,
    "q4m": Format.Q4_0,
    "nl4m": Format.NL4,
}
_LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")
_MAX_THREADS = 16
_WRITTEN_ANEW = {
    f"general.{key}" for key in ("architecture", "type", "name", "file_type", "quantization_version", "alignment")
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A matrix that was quantised beforehand: raw uint8 [rows, row_bytes] in Hugging Face row order.

    `output_error` is the relative L2 error of its product with the activations of the calibration text.
    """

    raw: npt.NDArray[np.uint8]
    format: Format
    error: QuantizationError
    output_error: float


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """What became of one tensor; the errors compare with the source as it was stored.

    `output_error` is that of `Prepared`, None for a tensor that was quantised without calibration.
    """

    name: str
    source_format: Format
    target_format: Format
    relative_error: float
    max_absolute_error: float
    output_error: float | None = None


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


def resolve_scheme(scheme: Scheme, destination: Path) -> Scheme:
    """Return the scheme with `q4` and `q4m` replaced by the 4-bit format that suits the destination.

    A .gguf file gets Q4_0, which every program that opens GGUF runs fast; a folder gets NL4, which is smaller and more
    exact and which only miniphi reads.
    """
    if is_gguf(destination) or scheme not in ("q4", "q4m"):
        return scheme
    return "nl4" if scheme == "q4" else "nl4m"


def is_gguf(destination: Path) -> bool:
    """Tell whether a destination is a GGUF file, by its name; anything else is a folder."""
    return destination.suffix == ".gguf"


def is_sensitive(name: str, num_layers: int) -> bool:
    """Tell whether a mixed scheme keeps 8 bits for a matrix inside the layers.

    Those are v_proj, which is small and whose error nothing dampens, and down_proj in the first and the last eighth of
    the layers and in every fifth between them. It makes a Llama model as large as llama.cpp's Q4_K_M, whose choice is
    alike, and a Phi-3 smaller.
    """
    found = _LAYER_NUMBER.search(name)
    if found is None or name.endswith(".self_attn.v_proj.weight"):
        return found is not None
    layer, border = int(found[1]), num_layers // 8
    is_outer = layer < border or layer >= num_layers - border
    return name.endswith(".mlp.down_proj.weight") and (is_outer or (layer - border) % 5 == 4)


def scheme_format(scheme: Scheme, name: str, num_dimensions: int, num_layers: int) -> Format:
    """Return the format that a scheme stores a tensor in."""
    if num_dimensions == 1:
        return Format.F32
    if name in (EMBEDDINGS, LM_HEAD) or (scheme.endswith("m") and is_sensitive(name, num_layers)):
        return Format.Q8_0
    return _MATRIX_FORMATS[scheme]


def quantize_checkpoint(
    source: Checkpoint,
    destination: Path,
    *,
    scheme: Scheme,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
    prepared: Mapping[str, Prepared] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    num_threads: int | None = None,
    on_progress: Callable[[TensorReport, float], None] | None = None,
) -> QuantizeReport:
    """Write `source` as a quantised model with its tokenizer and chat template.

    A destination that ends in .gguf is a GGUF file, any other a folder with safetensors. `importance` gives, for a
    tensor, the weight of each column's squared error [columns]. `prepared` has tensors that are quantised already, such
    as those of `miniphi.quantization.calibrate`. `name` becomes `general.name` of a GGUF file. `on_progress` is called
    after each tensor with its report and the fraction of bytes done. Memory stays bounded by a few chunks of rows. The
    file or folder appears complete or not at all.

    Raises CheckpointError if the destination is the source, a tensor holds values that are not finite, or its rows do
    not divide into blocks; StorageError if the destination exists (unless overwrite) or the disk is full.
    """
    if scheme not in _MATRIX_FORMATS:
        raise CheckpointError(f"scheme is {scheme!r}, expected one of {', '.join(_MATRIX_FORMATS)}")
    check_destination(source, destination, overwrite=overwrite)
    scheme = resolve_scheme(scheme, destination)
    threads = num_threads or min(os.cpu_count() or 1, _MAX_THREADS)
    jobs = _plan(source, scheme, importance or {}, prepared or {})
    total, done = source.num_bytes, 0

    def finish(key: str) -> None:
        nonlocal done
        done += source.tensors[key].num_bytes
        if on_progress is not None:
            on_progress(jobs[key].report(), done / total)

    sources = {key: job.source() for key, job in jobs.items()}
    if is_gguf(destination):
        write_gguf(
            destination,
            source.config,
            sources,
            tokenizer_metadata=tokenizer_metadata(source),
            general_metadata=_carried_metadata(source),
            name=name or _model_name(source),
            overwrite=overwrite,
            num_threads=threads,
            on_tensor=finish,
        )
    else:
        files = _folder_files(source)
        save_safetensors(destination, source.config, sources, extra_files=files, num_threads=threads, on_tensor=finish)
    return QuantizeReport(
        tensors=tuple(job.report() for job in jobs.values()),
        source_bytes=total,
        target_bytes=sum(each.num_bytes for each in sources.values()),
        num_values=sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values()),
    )


def _plan(
    source: Checkpoint,
    scheme: Scheme,
    importance: Mapping[str, npt.NDArray[np.float32]],
    prepared: Mapping[str, Prepared],
) -> "dict[str, _Job]":
    for label, names in (("importance", importance), ("prepared", prepared)):
        if unknown := set(names) - set(source.tensors):
            raise CheckpointError(f"{label}: {min(unknown)!r} is not a tensor of the model")
    num_layers = source.config.num_hidden_layers
    return {
        key: _Job(
            tensor,
            scheme_format(scheme, key, len(tensor.shape), num_layers),
            importance.get(key),
            prepared.get(key),
        )
        for key, tensor in source.tensors.items()
    }


def check_destination(source: Checkpoint, destination: Path, *, overwrite: bool) -> None:
    """Refuse a destination that cannot be written, before anything is computed.

    Raises CheckpointError if it is the source, StorageError if it exists (a folder that is not empty is never
    overwritten).
    """
    read = [source.path, *(file.path for file in source.files)]
    if destination.exists() and any(path.exists() and destination.samefile(path) for path in read):
        raise CheckpointError(f"{destination}: is the model that would be read; choose another name")
    if destination.suffix == ".safetensors":
        raise CheckpointError(f"{destination}: a model is more than its weights; name a folder, or a .gguf file")
    if not destination.parent.is_dir():
        raise CheckpointError(f"{destination}: the folder {destination.parent} does not exist")
    if is_gguf(destination):
        check_new_file(destination, overwrite=overwrite)
    else:
        check_new_folder(destination)


def _carried_metadata(source: Checkpoint) -> dict[str, object]:
    """Return what a GGUF source says about its origin: author, licence, languages."""
    own = {key: value for key, value in source.metadata.items() if key.startswith("general.")}
    return {key: value for key, value in own.items() if key not in _WRITTEN_ANEW}


def _folder_files(source: Checkpoint) -> dict[str, bytes | Path]:
    """Return what goes into a folder beside weights and config.json: tokenizer, chat template, ends of an answer."""
    ends = json.dumps({"eos_token_id": list(source.generation_eos_token_ids)})
    files: dict[str, bytes | Path] = {"generation_config.json": ends.encode()}
    if source.chat_template is not None:
        files["chat_template.jinja"] = source.chat_template.encode()
    if source.tokenizer_source is None:
        return files
    if source.tokenizer_source[0] == "gguf":
        metadata = source.tokenizer_source[1]
        # Which model it is decides how Phi-3's special tokens treat the white space around them.
        kept = [key for key in metadata if key.startswith("tokenizer.") or key == "general.architecture"]
        files[TOKENIZER_GGUF] = metadata_gguf({key: metadata[key] for key in kept})
        return files
    _, path, tokenizer_config = source.tokenizer_source
    files[path.name] = path
    files["tokenizer_config.json"] = json.dumps(tokenizer_config, ensure_ascii=False).encode()
    return files


def _model_name(source: Checkpoint) -> str:
    name = source.metadata.get("general.name")
    if isinstance(name, str):
        return name
    path = source.path.resolve()
    return path.name if path.is_dir() else path.stem


class _Job:
    """One tensor on its way to its new format; sums the error of all its chunks, from several threads."""

    def __init__(
        self,
        tensor: StoredTensor,
        target: Format,
        importance: npt.NDArray[np.float32] | None,
        prepared: Prepared | None,
    ) -> None:
        self.tensor = tensor
        self.target = target if prepared is None else prepared.format
        self.importance = importance
        self.prepared = prepared
        self.error = QuantizationError() if prepared is None else prepared.error
        self.lock = threading.Lock()

    def source(self) -> TensorSource:
        if self.prepared is not None:
            return TensorSource.from_bytes(self.prepared.raw, self.target, self.tensor.shape)
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
            output_error=None if self.prepared is None else self.prepared.output_error,
        )
