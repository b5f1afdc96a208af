"""Writing a model's file so that it is whole or absent: hashed on the way, synced, renamed; and what a full disk says.

Does not know where the bytes come from.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from miniphi.errors import DownloadError
from miniphi.models.cache import INCOMPLETE, StoredFile
from miniphi.models.progress import ProgressBar
from miniphi.models.sizes import format_bytes

__all__ = ["CHUNK_BYTES", "copy_stream", "disk_errors", "finish_file", "require_space", "sha256_of"]

CHUNK_BYTES = 1 << 20


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise DownloadError before anything is written if the folder's disk has less free than needed."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DownloadError(_full_disk(folder, needed_bytes, free))


@contextmanager
def disk_errors(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a full disk, met while writing under `folder`, into a DownloadError with the numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise DownloadError(_full_disk(folder, needed_bytes, free)) from error


def copy_stream(source: IO[bytes], target: Path, *, name: str, size: int, bar: ProgressBar) -> StoredFile:
    """Copy a stream of a known size to `target`, hashing it; `target` appears only when it is whole."""
    partial = target.with_name(target.name + INCOMPLETE)
    partial.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    written = 0
    with partial.open("wb") as file:
        while chunk := source.read(CHUNK_BYTES):
            written += len(chunk)
            if written > size:
                break
            file.write(chunk)
            digest.update(chunk)
            bar.advance(len(chunk))
        if written != size:
            found = "more" if written > size else f"{written:,}"
            raise DownloadError(f"{name} should have {size:,} bytes and has {found}: it changed while it was read")
        finish_file(file)
    partial.replace(target)
    return StoredFile(name=name, size=size, sha256=digest.hexdigest())


def finish_file(file: IO[bytes]) -> None:
    """Put a file's bytes on the disk, so that a manifest written later never vouches for bytes that were lost."""
    file.flush()
    os.fsync(file.fileno())


def sha256_of(path: Path, bar: ProgressBar) -> str:
    """Return a file's sha256 in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.advance(len(chunk))
    return digest.hexdigest()


def _full_disk(folder: Path, needed_bytes: int, free_bytes: int) -> str:
    return (
        f"the disk of {folder} has {format_bytes(free_bytes)} free and the model needs {format_bytes(needed_bytes)}: "
        f"free some space, or set MINIPHI_HOME to a folder on another disk"
    )
