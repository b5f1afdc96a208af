"""Tensors on their way into a file: checked against the configuration, then written a few rows at a time.

Owns the check and the stream; the writers own the file formats.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from miniphi.checkpoint.mapped_file import quoted
from miniphi.checkpoint.names import expected_shapes
from miniphi.checkpoint.stored import StoredTensor, TensorSource
from miniphi.config import ModelConfig
from miniphi.errors import CheckpointError

__all__ = ["Tensors", "check_columns", "check_sources", "stream_tensor"]

Tensors: TypeAlias = Mapping[str, TensorSource | StoredTensor | npt.NDArray[np.floating]]
"""What the writers take, by Hugging Face name; plain arrays are stored as F32."""

_CHUNK_VALUES = 1 << 18  # values per step: small enough for the cache, large enough to hide the cost of a call


def check_sources(config: ModelConfig, tensors: Tensors) -> dict[str, TensorSource]:
    """Return the tensors in the order of the model. Raises CheckpointError if one is missing, surplus or misshapen."""
    shapes = expected_shapes(config)
    if surplus := sorted(set(tensors) - set(shapes)):
        raise CheckpointError(f"{quoted(surplus[0])}: the configuration has no such tensor ({len(surplus)} surplus)")
    if missing := [name for name in shapes if name not in tensors]:
        raise CheckpointError(f"{missing[0]}: is missing ({len(missing)} in all)")
    sources: dict[str, TensorSource] = {}
    for name, shape in shapes.items():
        source = _as_source(tensors[name])
        if source.shape != shape:
            raise CheckpointError(f"{name}: has shape {list(source.shape)}, the configuration says {list(shape)}")
        sources[name] = source
    return sources


def check_columns(sources: Mapping[str, TensorSource]) -> None:
    """Raise CheckpointError if a tensor's rows do not divide into blocks of its format."""
    for name, source in sources.items():
        try:
            source.format.row_bytes(source.shape[-1])
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None


def _as_source(tensor: TensorSource | StoredTensor | npt.NDArray[np.floating]) -> TensorSource:
    if isinstance(tensor, TensorSource):
        return tensor
    return TensorSource.from_stored(tensor) if isinstance(tensor, StoredTensor) else TensorSource.from_floats(tensor)


def stream_tensor(
    file: BinaryIO,
    source: TensorSource,
    *,
    row_group: int = 1,
    pool: ThreadPoolExecutor | None = None,
    num_threads: int = 1,
) -> None:
    """Write all rows of a tensor, reading whole groups of `row_group` rows at a time, ahead in `pool` if given."""
    steps = _row_ranges(source, row_group)
    chunks = _read_in_order(source.read_rows, steps, pool, num_threads)
    written = 0
    for chunk in chunks:
        file.write(np.ascontiguousarray(chunk).data)
        written += chunk.nbytes
    if written != source.num_bytes:
        raise CheckpointError(f"a tensor of shape {list(source.shape)} gave {written} bytes, not {source.num_bytes}")
    if source.release is not None:
        source.release()


def _row_ranges(source: TensorSource, row_group: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_VALUES // source.shape[-1] // row_group) * row_group
    for start in range(0, source.num_rows, step):
        yield start, min(start + step, source.num_rows)


def _read_in_order(
    read_rows: Callable[[int, int], npt.NDArray[np.uint8]],
    steps: Iterator[tuple[int, int]],
    pool: ThreadPoolExecutor | None,
    num_threads: int,
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the chunks in order, with at most `num_threads` + 1 of them in memory."""
    if pool is None:
        for start, stop in steps:
            yield read_rows(start, stop)
        return
    pending: deque[Future[npt.NDArray[np.uint8]]] = deque()
    for start, stop in steps:
        pending.append(pool.submit(read_rows, start, stop))
        if len(pending) > num_threads:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
