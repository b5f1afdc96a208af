"""A file mapped read-only into memory, and the words for what is wrong with one.

Owns the mapping and its pages. Knows no file format.
"""

import mmap
import os
import reprlib
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from miniphi.errors import CheckpointError

__all__ = ["MappedFile", "quoted"]

_MAX_QUOTED = 120  # characters of a value from a file that an error message shows
_REPR = reprlib.Repr()
_REPR.maxstring = _MAX_QUOTED
_REPR.maxlist = 9
_REPR.maxlevel = 3


def quoted(value: object) -> str:
    """Return a value from an untrusted file as it may appear in a message: escaped, and neither long nor deep."""
    text = _REPR.repr(value)
    return text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "..."


class MappedFile:
    """A read-only mapping of a whole file; `data` is its bytes (uint8 [size], not writeable)."""

    def __init__(self, path: Path) -> None:
        """Map `path`. Raises CheckpointError if it is missing, not a regular file, unreadable or empty."""
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise CheckpointError(f"{path}: is not a regular file")
                if status.st_size == 0:
                    raise CheckpointError(f"{path}: is empty; the download was probably interrupted, fetch it again")
                self.mapping = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        self.size = len(self.mapping)
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self.mapping, dtype=np.uint8)

    def release_pages(self, offset: int, num_bytes: int) -> None:
        """Drop the resident pages of a byte range; reading them again reads the file again."""
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if advice is None or num_bytes == 0:
            return
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self.mapping.madvise(advice, start, min(offset + num_bytes, self.size) - start)

    def close(self) -> None:
        """Unmap the file, or leave that to the last array that still looks into it."""
        self.data = np.empty(0, dtype=np.uint8)
        try:
            self.mapping.close()
        except BufferError:  # an array outlives us: unmapping under it would crash the process
            return
