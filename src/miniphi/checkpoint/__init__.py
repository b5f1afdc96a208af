"""Checkpoints in and out: Hugging Face folders with safetensors, GGUF files, and quantisation between them.

Names are imported when they are first used: a start-up from a packed copy reads no checkpoint, and one that only reads
does not pay for writing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miniphi.checkpoint.checkpoint import open_checkpoint
    from miniphi.checkpoint.formats import Format, dequantize
    from miniphi.checkpoint.gguf import GGUFFile, open_gguf
    from miniphi.checkpoint.gguf_tokenizer import tokenizer_metadata
    from miniphi.checkpoint.gguf_writer import write_gguf
    from miniphi.checkpoint.names import expected_shapes
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
    from miniphi.checkpoint.stored import Checkpoint, StoredTensor, TensorSource, TokenizerSource
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

_MODULES = {
    "checkpoint": ("open_checkpoint",),
    "formats": ("Format", "dequantize"),
    "gguf": ("GGUFFile", "open_gguf"),
    "gguf_tokenizer": ("tokenizer_metadata",),
    "gguf_writer": ("write_gguf",),
    "names": ("expected_shapes",),
    "quantize": ("QuantizationError", "quantize_rows"),
    "quantize_model": (
        "Prepared",
        "QuantizeReport",
        "Scheme",
        "TensorReport",
        "check_destination",
        "quantize_checkpoint",
        "resolve_scheme",
        "scheme_format",
    ),
    "safetensors_writer": ("save_safetensors",),
    "stored": ("Checkpoint", "StoredTensor", "TensorSource", "TokenizerSource"),
    "synthetic": ("synthetic_tensors", "write_synthetic_gguf"),
}
_HOME_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
