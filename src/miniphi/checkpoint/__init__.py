"""Checkpoints in and out: Hugging Face folders with safetensors, GGUF files, and quantisation between them.

Reading is imported at once, writing when it is first used: a start-up that only reads does not pay for the rest.
"""

import importlib
from typing import TYPE_CHECKING, Any

from miniphi.checkpoint.checkpoint import open_checkpoint
from miniphi.checkpoint.formats import Format, dequantize
from miniphi.checkpoint.gguf import GGUFFile, open_gguf
from miniphi.checkpoint.names import expected_shapes
from miniphi.checkpoint.stored import Checkpoint, StoredTensor, TensorSource, TokenizerSource

if TYPE_CHECKING:
    from miniphi.checkpoint.gguf_tokenizer import tokenizer_metadata
    from miniphi.checkpoint.gguf_writer import write_gguf
    from miniphi.checkpoint.quantize import QuantizationError, quantize_rows
    from miniphi.checkpoint.quantize_model import (
        Prepared,
        QuantizeReport,
        Scheme,
        TensorReport,
        check_destination,
        quantize_checkpoint,
        resolve_scheme,
        scheme_format,
    )
    from miniphi.checkpoint.safetensors_writer import save_safetensors
    from miniphi.checkpoint.synthetic import synthetic_tensors, write_synthetic_gguf

__all__ = [
    "Checkpoint",
    "Format",
    "GGUFFile",
    "Prepared",
    "QuantizationError",
    "QuantizeReport",
    "Scheme",
    "StoredTensor",
    "TensorReport",
    "TensorSource",
    "TokenizerSource",
    "check_destination",
    "dequantize",
    "expected_shapes",
    "open_checkpoint",
    "open_gguf",
    "quantize_checkpoint",
    "quantize_rows",
    "resolve_scheme",
    "save_safetensors",
    "scheme_format",
    "synthetic_tensors",
    "tokenizer_metadata",
    "write_gguf",
    "write_synthetic_gguf",
]

_WRITERS = {
    "Prepared": "quantize_model",
    "QuantizationError": "quantize",
    "QuantizeReport": "quantize_model",
    "Scheme": "quantize_model",
    "TensorReport": "quantize_model",
    "check_destination": "quantize_model",
    "quantize_checkpoint": "quantize_model",
    "quantize_rows": "quantize",
    "resolve_scheme": "quantize_model",
    "scheme_format": "quantize_model",
    "save_safetensors": "safetensors_writer",
    "synthetic_tensors": "synthetic",
    "tokenizer_metadata": "gguf_tokenizer",
    "write_gguf": "gguf_writer",
    "write_synthetic_gguf": "synthetic",
}


def __getattr__(name: str) -> Any:
    if name not in _WRITERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WRITERS[name]}"), name)
