"""A GGUF file as a model: Hugging Face names and row order, checked against the configuration.

Owns the translation between GGUF tensors and StoredTensor. The file format is gguf.py's, the keys are ModelConfig's.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from miniphi.checkpoint.checks import check_count, check_names, check_shape
from miniphi.checkpoint.formats import Format, dequantize
from miniphi.checkpoint.gguf import GGUFFile, GGUFTensor, open_gguf
from miniphi.checkpoint.mapped_file import quoted
from miniphi.checkpoint.names import (
    expected_shapes,
    gguf_names,
    gguf_row_order,
    has_permuted_rows,
    is_harmless_surplus,
)
from miniphi.checkpoint.stored import Checkpoint, StoredTensor, TokenizerSource
from miniphi.config import ModelConfig
from miniphi.errors import CheckpointError, UnsupportedModelError

__all__ = ["LONG_FACTORS", "SHORT_FACTORS", "open_gguf_model"]

LONG_FACTORS = "rope_factors_long.weight"
SHORT_FACTORS = "rope_factors_short.weight"
_LLAMA3_FREQUENCIES = "rope_freqs.weight"
_OUTPUT = "output.weight"
_MAX_FACTORS = 4096


def open_gguf_model(path: Path) -> Checkpoint:
    """Open a GGUF file as a model. Raises CheckpointError or UnsupportedModelError naming the file and the tensor."""
    file = open_gguf(path)
    try:
        return _build(file, path)
    except BaseException:
        file.file.close()
        raise


def _build(file: GGUFFile, path: Path) -> Checkpoint:
    _reject_unsupported(file, path)
    tensors = dict(file.tensors)
    long_factor = _pop_factors(file, tensors, LONG_FACTORS)
    short_factor = _pop_factors(file, tensors, SHORT_FACTORS)
    config = ModelConfig.from_gguf(
        file.metadata,
        long_factor=long_factor,
        short_factor=short_factor,
        tied=_OUTPUT not in tensors,
        source=str(path),
    )
    metadata = file.metadata
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: tokenizer.chat_template is {quoted(template)}, expected text")
    source: TokenizerSource | None = ("gguf", metadata) if "tokenizer.ggml.tokens" in metadata else None
    return Checkpoint(
        path=path,
        config=config,
        tensors=_stored_tensors(file, tensors, config, path),
        tokenizer_source=source,
        chat_template=template,
        generation_eos_token_ids=config.eos_token_ids,
        metadata=metadata,
        files=(file.file,),
    )


def _reject_unsupported(file: GGUFFile, path: Path) -> None:
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise UnsupportedModelError(
            f"{path}: split.count is {quoted(parts)}; join the parts first (llama-gguf-split --merge)"
        )
    if _LLAMA3_FREQUENCIES in file.tensors:
        raise UnsupportedModelError(f"{path}: has {_LLAMA3_FREQUENCIES}; Llama 3 rope scaling is not supported")
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(f"{path}: general.type is {quoted(kind)}, expected 'model'")


def _pop_factors(file: GGUFFile, tensors: dict[str, GGUFTensor], name: str) -> tuple[float, ...] | None:
    tensor = tensors.pop(name, None)
    if tensor is None:
        return None
    if tensor.format is not Format.F32 or len(tensor.shape) != 1 or tensor.shape[0] > _MAX_FACTORS:
        raise CheckpointError(
            f"{file.file.path}: {name} is {tensor.format.name} {list(tensor.shape)}, expected a short F32 vector"
        )
    return tuple(dequantize(file.raw(tensor), tensor.format)[0].tolist())


def _stored_tensors(
    file: GGUFFile, tensors: Mapping[str, GGUFTensor], config: ModelConfig, path: Path
) -> dict[str, StoredTensor]:
    check_count(config, len(tensors), path)
    names = gguf_names(config)
    shapes = expected_shapes(config)
    known = set(names.values())
    surplus = [name for name in tensors if name not in known and not is_harmless_surplus(name)]
    missing = [name for name in known if name not in tensors]
    check_names(surplus, missing, path)
    orders = _row_orders(config, path)
    stored: dict[str, StoredTensor] = {}
    for name, gguf_name in names.items():
        tensor = tensors[gguf_name]
        check_shape(gguf_name, tensor.shape, shapes[name], path)
        stored[name] = StoredTensor(
            name=name,
            format=tensor.format,
            shape=tensor.shape,
            raw=file.raw(tensor),
            row_order=orders[tensor.shape[0]] if has_permuted_rows(config, name) else None,
            file=file.file,
            file_offset=tensor.offset,
        )
    return stored


def _row_orders(config: ModelConfig, path: Path) -> dict[int, npt.NDArray[np.int32]]:
    """Row orders by number of rows, for the tensors that have one."""
    if config.model_type != "llama":
        return {}
    if config.rotary_dim != config.head_dim or config.head_dim % 2:
        raise UnsupportedModelError(
            f"{path}: rotates {config.rotary_dim} of {config.head_dim} dimensions of a head; expected all of them"
        )
    rows = {heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)}
    return {num_rows: gguf_row_order(num_rows, config.head_dim) for num_rows in rows}
