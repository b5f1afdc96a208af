"""The door to the native kernels: weight formats, packed matrices, programs, samplers, and this machine.

Owns the names and numbers that Python and csrc share. Knows no model, no file and no scheduling.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from miniphi.errors import CapacityError, InvalidRequestError, MiniphiError

try:
    from miniphi.kernels import _native
except ImportError as error:  # pragma: no cover - only a broken installation gets here
    raise MiniphiError(
        f"the native kernels cannot be loaded ({error}); install miniphi again with a C++20 compiler: pip install ."
    ) from error

__all__ = [
    "CacheType",
    "Kind",
    "MachineLimits",
    "MappedMatrices",
    "Meter",
    "NativeProgram",
    "NativeSampler",
    "PackedMatrix",
    "Packer",
    "available_isas",
    "cache_block_bytes",
    "default_num_threads",
    "layout_fingerprint",
    "matmul",
    "sample_rows",
    "score_rows",
    "selected_isa",
    "uniform",
]

PackedMatrix = _native.PackedMatrix
NativeProgram = _native.Program
NativeSampler = _native.Sampler


class Kind(IntEnum):
    """Formats of a packed matrix, numbered as in csrc/blocks.h and named as in GGUF; NL4 is ours."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8_0 = 3
    Q4_0 = 4
    Q4_1 = 5
    Q5_0 = 6
    Q5_1 = 7
    Q4_K = 8
    Q5_K = 9
    Q6_K = 10
    IQ4_NL = 11
    NL4 = 12

    @property
    def is_quantized(self) -> bool:
        """Whether products with this matrix use int8 activations."""
        return self >= Kind.Q8_0

    @property
    def activation_group(self) -> int:
        """How many activations share one int8 scale in products with this matrix."""
        return 64 if self is Kind.NL4 else 32


class CacheType(IntEnum):
    """How keys and values are stored, numbered as in csrc/kv_cache.h."""

    F32 = 0
    F16 = 1
    Q8 = 2
    Q4 = 3

    @classmethod
    def parse(cls, name: str) -> "CacheType":
        """Return the type with this name. Raises InvalidRequestError for any other."""
        try:
            return cls[name.upper()]
        except KeyError:
            known = ", ".join(member.name.lower() for member in cls)
            raise InvalidRequestError(f"kv type {name!r} is unknown; choose one of {known}") from None


@dataclass(frozen=True, kw_only=True)
class MachineLimits:
    """What the machine reached a moment ago, all threads together."""

    isa: str
    num_threads: int
    int8_ops_per_s: float
    read_bytes_per_s: float


class Meter:
    """Measures what the machine gives just now, in some 20 ms, between any two pieces of work.

    Other programs change that from one second to the next, so a share of the limit is worth as much as its
    measurement is near. Takes `bytes_per_thread` of memory (default: 512 MB in all, and at least 64 MB each).
    """

    def __init__(self, *, isa: str | None = None, num_threads: int | None = None, bytes_per_thread: int | None = None):
        self._isa = selected_isa(isa)
        self._num_threads = num_threads or default_num_threads()
        size = bytes_per_thread or max(1 << 26, (1 << 29) // self._num_threads)
        self._native = _native.Meter(self._isa, self._num_threads, size)

    def measure(self) -> MachineLimits:
        """Return the int8 rate and the read bandwidth: the limits of prefill and of decode."""
        return MachineLimits(
            isa=self._isa,
            num_threads=self._num_threads,
            int8_ops_per_s=self._native.int8_ops_per_s(),
            read_bytes_per_s=self._native.read_bytes_per_s(),
        )


def available_isas() -> tuple[str, ...]:
    """Return the instruction sets of this build that this processor runs, best first."""
    return tuple(_native.available_isas())


def selected_isa(name: str | None = None) -> str:
    """Return the instruction set that `name`, else MINIPHI_ISA, else the processor selects.

    Raises InvalidRequestError if it is not available here.
    """
    try:
        return _native.selected_isa(name or "")
    except ValueError as error:
        raise InvalidRequestError(str(error)) from None


def default_num_threads() -> int:
    """Return the number of physical cores that this process may use: a second thread on a core only adds noise."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


class Packer:
    """Rearranges stored rows into the layout of csrc/blocks.h, without loss; matrices share large pieces of memory."""

    def __init__(self, num_threads: int = 1) -> None:
        if num_threads < 1:
            raise InvalidRequestError(f"num_threads is {num_threads}; it must be at least 1")
        self._native = _native.Packer(num_threads)

    def pack(
        self, kind: Kind, stored: NDArray[np.uint8], depth: int, row_order: NDArray[np.int32] | None = None
    ) -> PackedMatrix:
        """Pack a matrix from its stored rows, uint8 [rows, row_bytes] of `depth` values each.

        Logical row i is stored row `row_order[i]`. Raises CapacityError if the memory cannot be had.
        """
        try:
            return self._native.pack(int(kind), stored, depth, row_order)
        except MemoryError:
            raise CapacityError(f"no memory for a packed matrix of {stored.nbytes:,} bytes") from None


class MappedMatrices:
    """A file with packed matrices, mapped read-only; a thread of its own makes its pages present meanwhile.

    The file must not be cut short while a matrix of it is in use; replacing it by another is harmless.
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """Map an open file, whose descriptor may be closed afterwards. Raises CapacityError without address space."""
        try:
            self._native = _native.MappedFile(descriptor, num_bytes)
        except MemoryError:
            raise CapacityError(f"no address space to map a file of {num_bytes:,} bytes") from None

    def matrix(self, kind: Kind, rows: int, depth: int, offset: int) -> PackedMatrix:
        """Return the matrix that lies packed at `offset`. Raises ValueError unless the file can hold it there."""
        return self._native.matrix(int(kind), rows, depth, offset)


def layout_fingerprint(kind: Kind) -> int:
    """Return a number that is another one whenever the packed layout of this kind changes. Takes microseconds."""
    return _native.layout_fingerprint(int(kind))


def matmul(
    matrices: Sequence[PackedMatrix],
    x: NDArray[np.float32],
    *,
    fine: bool = False,
    isa: str | None = None,
    num_threads: int = 1,
) -> NDArray[np.float32]:
    """Return x [rows, K] times the transposed matrices, side by side: [rows, sum of N].

    Where a matrix is quantised, x is rounded to int8 in groups; `fine` gives it a second int8 plane for the rest.
    """
    return _native.matmul(list(matrices), x, fine, selected_isa(isa), num_threads)


def sample_rows(
    logits: NDArray[np.float32],
    samplers: Sequence[NativeSampler],
    rows: Sequence[int],
    positions: Sequence[int],
    drafts: Sequence[Sequence[int]],
) -> list[list[tuple[int, float | None, list[tuple[int, float]] | None]]]:
    """Draw tokens from logits [rows, V], which are overwritten, as csrc/sampler.h describes.

    Sampler i draws token `positions[i]` of its answer from row `rows[i]`, and from the rows after it while its tokens
    are those of `drafts[i]`. Returns each sampler's tokens as (token id, log-probability, best alternatives).
    Raises MiniphiError for a logit that is not finite, or where everything is masked.
    """
    try:
        return _native.sample(logits, samplers, rows, positions, drafts)
    except RuntimeError as error:
        raise MiniphiError(str(error)) from None


def score_rows(
    logits: NDArray[np.float32], token_ids: NDArray[np.int32], num_best: int = 0
) -> list[tuple[float, bool, list[tuple[int, float]]]]:
    """Return of each token its log-probability under its row of logits [rows, V], and whether it is the likeliest.

    With them come the `num_best` likeliest tokens of the row, best first.

    Raises MiniphiError for a logit that is not finite.
    """
    try:
        return _native.score_tokens(logits, token_ids, num_best)
    except RuntimeError as error:
        raise MiniphiError(str(error)) from None


def uniform(seed: int, choice: int, position: int) -> float:
    """Return a number from 0 to below 1, on a grid of 2**-53, that depends on nothing but the arguments."""
    return _native.uniform(seed, choice, position)


def cache_block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, cache_type: CacheType) -> int:
    """Return the bytes of one cache block of 32 tokens, all layers."""
    return _native.cache_block_bytes(num_layers, num_kv_heads, head_dim, int(cache_type))
