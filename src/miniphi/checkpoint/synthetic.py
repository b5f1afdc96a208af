"""Random models of a given shape, streamed to disk: for benchmarks and tests of sizes that nobody wants to download.

Owns the random weights. They have the spread of trained ones (logits stay finite), and mean nothing.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from miniphi.checkpoint.formats import LEVELS, Format
from miniphi.checkpoint.gguf_writer import write_gguf
from miniphi.checkpoint.names import expected_shapes
from miniphi.checkpoint.quantize_model import Scheme, scheme_format
from miniphi.checkpoint.stored import TensorSource
from miniphi.config import ModelConfig

__all__ = ["synthetic_tensors", "write_synthetic_gguf"]

# Standard deviation of value / scale when the bytes of the codes are uniformly random.
_SPREAD = {Format.Q8_0: 73.9, **{fmt: float(np.std(levels)) for fmt, levels in LEVELS.items()}}


def write_synthetic_gguf(
    path: Path,
    config: ModelConfig,
    *,
    scheme: Scheme,
    seed: int = 0,
    tokenizer_metadata: Mapping[str, object] | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a random model as GGUF and return its size in bytes. Memory stays small whatever the size.

    Raises CheckpointError if the file exists (unless overwrite) or the disk is full.
    """
    tensors = synthetic_tensors(config, scheme=scheme, seed=seed)
    return write_gguf(
        path, config, tensors, tokenizer_metadata=tokenizer_metadata, name=name, overwrite=overwrite, num_threads=1
    )


def synthetic_tensors(config: ModelConfig, *, scheme: Scheme, seed: int = 0) -> dict[str, TensorSource]:
    """Return random tensors by Hugging Face name, quantised as `scheme` says; norms are ones.

    The same seed and shape give the same bytes, whatever rows are read in whatever order.
    """
    tensors: dict[str, TensorSource] = {}
    for number, (name, shape) in enumerate(expected_shapes(config).items()):
        fmt = scheme_format(scheme, name, len(shape), config.num_hidden_layers)
        if fmt is Format.F32:
            tensors[name] = TensorSource.from_floats(np.ones(shape, dtype=np.float32))
        else:
            tensors[name] = _random_matrix(fmt, shape, (seed, number))
    return tensors


def _random_matrix(fmt: Format, shape: tuple[int, ...], key: tuple[int, int]) -> TensorSource:
    num_columns = shape[-1]
    scale = np.float16(num_columns**-0.5 / _SPREAD[fmt])
    row_bytes = fmt.row_bytes(num_columns)
    row_words = -(-row_bytes // 8)

    def read_rows(start: int, stop: int) -> npt.NDArray[np.uint8]:
        generator = np.random.PCG64(key).advance(start * row_words)
        words: npt.NDArray[np.uint64] = generator.random_raw((stop - start) * row_words)
        rows = words.view(np.uint8).reshape(stop - start, 8 * row_words)[:, :row_bytes]
        blocks = np.ascontiguousarray(rows).reshape(-1, fmt.block_bytes)
        blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        if fmt is Format.Q8_0:  # genuine files never hold -128
            np.maximum(blocks[:, 2:].view(np.int8), -127, out=blocks[:, 2:].view(np.int8))
        return blocks.reshape(stop - start, row_bytes)

    return TensorSource(format=fmt, shape=shape, read_rows=read_rows)
