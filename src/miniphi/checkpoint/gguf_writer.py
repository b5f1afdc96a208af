"""Writer of GGUF files that llama.cpp opens.

Owns the bytes of the file, the architecture keys and the row order of GGUF. The tensors stream through, a few rows at
a time, so a file may be far larger than memory. Tokenizer metadata comes ready-made (gguf_tokenizer.py).
"""

import struct
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from miniphi.atomic_write import atomic_file, check_free_space
from miniphi.checkpoint.formats import Format, dequantize
from miniphi.checkpoint.gguf import DEFAULT_ALIGNMENT, MAGIC, VERSION, ValueType
from miniphi.checkpoint.gguf_model import LONG_FACTORS, SHORT_FACTORS
from miniphi.checkpoint.names import gguf_names, gguf_row_order, has_permuted_rows
from miniphi.checkpoint.stored import TensorSource, encode_floats
from miniphi.checkpoint.streaming import Tensors, check_columns, check_sources, stream_tensor
from miniphi.config import ModelConfig
from miniphi.errors import CheckpointError, UnsupportedModelError

__all__ = ["metadata_gguf", "write_gguf"]

# general.file_type (enum llama_ftype of llama.cpp): what most matrices are.
_FILE_TYPES = {
    Format.F32: 0,
    Format.F16: 1,
    Format.Q4_0: 2,
    Format.Q4_1: 3,
    Format.Q8_0: 7,
    Format.Q5_0: 8,
    Format.Q5_1: 9,
    Format.Q4_K: 15,
    Format.Q5_K: 17,
    Format.Q6_K: 18,
    Format.IQ4_NL: 25,
    Format.BF16: 32,
}
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION: the layouts in formats.py
_MAX_NAME_BYTES = 64


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Tensors,
    *,
    tokenizer_metadata: Mapping[str, object] | None = None,
    general_metadata: Mapping[str, object] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    num_threads: int = 1,
    on_tensor: Callable[[str], None] | None = None,
) -> int:
    """Write a model as one GGUF file and return its size in bytes. The file appears complete or not at all.

    `tensors` has Hugging Face names and row order; vectors are stored as F32, as llama.cpp wants them. `name` is
    `general.name` (llama.cpp recognises the tokenizer rules of Phi-3 by "phi-3" in it); `general_metadata` has further
    keys of that kind, such as a licence. With `num_threads` > 1, `read_rows` of a source is called from several
    threads. `on_tensor` is called with each name once it is written.

    Raises CheckpointError if a tensor is missing, surplus or misshapen; StorageError if the file exists or the disk
    is full.
    """
    _check_rotation(config)
    sources = {key: _vector_as_f32(source) for key, source in check_sources(config, tensors).items()}
    _check_formats(sources)
    metadata = {
        **_general_metadata(config, sources, name or path.stem),
        **(general_metadata or {}),
        **_architecture_metadata(config),
        **(tokenizer_metadata or {}),
    }
    factors = _factor_sources(config)
    names = gguf_names(config)
    table = [(gguf_name, source) for gguf_name, source in factors.items()]
    table += [(names[key], source) for key, source in sources.items()]
    header = _header(metadata, table)
    size = len(header) + sum(_padded(source.num_bytes) for _, source in table)
    with atomic_file(path, overwrite=overwrite) as file:
        check_free_space(path.parent, size)
        file.write(header)
        for source in factors.values():
            stream_tensor(file, source)
            _pad(file, source)
        with ThreadPoolExecutor(num_threads, thread_name_prefix="miniphi-write") as pool:
            for key, source in sources.items():
                group = config.head_dim if has_permuted_rows(config, key) else 1
                stored = _in_gguf_order(source, group) if group > 1 else source
                stream_tensor(
                    file, stored, row_group=group, pool=pool if num_threads > 1 else None, num_threads=num_threads
                )
                _pad(file, source)
                if on_tensor is not None:
                    on_tensor(key)
    return size


def metadata_gguf(metadata: Mapping[str, object]) -> bytes:
    """Return a GGUF file that has metadata and no tensors."""
    return _header(metadata, [])


def _check_rotation(config: ModelConfig) -> None:
    if config.model_type == "llama" and (config.rotary_dim != config.head_dim or config.head_dim % 2):
        raise UnsupportedModelError(
            f"rotates {config.rotary_dim} of {config.head_dim} dimensions of a head; a llama GGUF needs all of them"
        )


def _check_formats(sources: Mapping[str, TensorSource]) -> None:
    for key, source in sources.items():
        if source.format.ggml_type is None:
            raise CheckpointError(f"{key}: GGUF has no type {source.format.name}; write a folder instead")
    check_columns(sources)


def _vector_as_f32(source: TensorSource) -> TensorSource:
    if len(source.shape) > 1 or source.format is Format.F32:
        return source

    def read_rows(start: int, stop: int) -> npt.NDArray[np.uint8]:
        return encode_floats(dequantize(source.read_rows(start, stop), source.format), Format.F32)

    return TensorSource(format=Format.F32, shape=source.shape, read_rows=read_rows, release=source.release)


def _in_gguf_order(source: TensorSource, head_dim: int) -> TensorSource:
    """Interleave the halves of each head, as `llama` GGUF files store q and k."""
    within_head = np.argsort(gguf_row_order(head_dim, head_dim))

    def read_rows(start: int, stop: int) -> npt.NDArray[np.uint8]:
        heads = np.ascontiguousarray(source.read_rows(start, stop)).reshape((stop - start) // head_dim, head_dim, -1)
        return heads[:, within_head].reshape(stop - start, -1)

    return TensorSource(format=source.format, shape=source.shape, read_rows=read_rows, release=source.release)


def _factor_sources(config: ModelConfig) -> dict[str, TensorSource]:
    if config.rope_scaling is None:
        return {}
    lists = {LONG_FACTORS: config.rope_scaling.long_factor, SHORT_FACTORS: config.rope_scaling.short_factor}
    return {key: TensorSource.from_floats(np.array(values, dtype=np.float32)) for key, values in lists.items()}


def _general_metadata(config: ModelConfig, sources: Mapping[str, TensorSource], name: str) -> dict[str, object]:
    matrices = Counter(source.format for source in sources.values() if len(source.shape) > 1)
    return {
        "general.architecture": config.model_type,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[matrices.most_common(1)[0][0]],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }


def _architecture_metadata(config: ModelConfig) -> dict[str, object]:
    values: dict[str, object] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": config.rope_theta,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        values["attention.key_length"] = values["attention.value_length"] = config.head_dim
    if config.model_type == "phi3":
        values["attention.sliding_window"] = config.sliding_window or 0
        values["rope.scaling.original_context_length"] = config.max_position_embeddings
    if config.rope_scaling is not None:
        values["rope.scaling.original_context_length"] = config.rope_scaling.original_max_position_embeddings
        values["rope.scaling.attn_factor"] = config.rope_scaling.attention_factor
    return {f"{config.model_type}.{key}": value for key, value in values.items()}


def _header(metadata: Mapping[str, object], table: list[tuple[str, TensorSource]]) -> bytes:
    """Everything before the tensor data, padded to the alignment."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(table), len(metadata))]
    parts += [_string(key) + _value(key, value) for key, value in metadata.items()]
    offset = 0
    for gguf_name, source in table:
        if len(gguf_name.encode()) > _MAX_NAME_BYTES:
            raise CheckpointError(f"{gguf_name}: the name is longer than {_MAX_NAME_BYTES} bytes")
        columns_first = source.shape[::-1]
        sizes = struct.pack(f"<I{len(columns_first)}Q", len(columns_first), *columns_first)
        parts.append(_string(gguf_name) + sizes + struct.pack("<IQ", source.format.ggml_type, offset))
        offset += _padded(source.num_bytes)
    header = b"".join(parts)
    return header.ljust(_padded(len(header)), b"\0")


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _value(key: str, value: object) -> bytes:
    """Encode a value with its type. Whole numbers are UINT32 and, in arrays, INT32, unless they do not fit."""
    if isinstance(value, str):
        return struct.pack("<I", ValueType.STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<I", ValueType.ARRAY) + _array(key, value)
    if isinstance(value, bool):
        return struct.pack("<IB", ValueType.BOOL, value)
    if isinstance(value, float):
        return struct.pack("<If", ValueType.FLOAT32, value)
    if isinstance(value, int):
        kind, code = (ValueType.UINT32, "I") if 0 <= value < 1 << 32 else (ValueType.INT64, "q")
        return struct.pack(f"<I{code}", kind, value)
    raise CheckpointError(f"{key}: GGUF has no value of type {type(value).__name__}")


def _array(key: str, items: list[object]) -> bytes:
    if all(isinstance(item, str) for item in items):
        head = struct.pack("<IQ", ValueType.STRING, len(items))
        return head + b"".join(_string(str(item)) for item in items)
    if all(isinstance(item, bool) for item in items):
        return struct.pack("<IQ", ValueType.BOOL, len(items)) + bytes(bool(item) for item in items)
    if all(isinstance(item, int) for item in items):
        numbers = np.array(items, dtype=np.int64)
        if np.array_equal(numbers, numbers.astype(np.int32)):
            return struct.pack("<IQ", ValueType.INT32, len(items)) + numbers.astype("<i4").tobytes()
        return struct.pack("<IQ", ValueType.INT64, len(items)) + numbers.astype("<i8").tobytes()
    if all(isinstance(item, (int, float)) for item in items):
        return struct.pack("<IQ", ValueType.FLOAT32, len(items)) + np.array(items, dtype="<f4").tobytes()
    raise CheckpointError(f"{key}: expected an array of one type, of text or numbers")


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _pad(file: BinaryIO, source: TensorSource) -> None:
    file.write(bytes(_padded(source.num_bytes) - source.num_bytes))
