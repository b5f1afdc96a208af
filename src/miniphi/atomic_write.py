"""Files and folders that appear complete or not at all.

Owns the temporary name beside the destination, fsync and rename, and what a full disk looks like to the user. Knows
no file format.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from miniphi.errors import StorageError

__all__ = ["atomic_file", "atomic_folder", "check_free_space", "check_new_file", "check_new_folder", "write_file"]


@contextmanager
def atomic_file(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Yield a file that takes the name `path` when the block ends well, and vanishes on any error or Ctrl-C.

    Raises StorageError if `path` exists (unless overwrite), or cannot be written.
    """
    check_new_file(path, overwrite=overwrite)
    temporary = _temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder that takes the name `path` when the block ends well, and vanishes on any error or Ctrl-C.

    Raises StorageError if `path` exists and is not an empty folder, or cannot be written.
    """
    check_new_folder(path)
    temporary = _temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _sync_folder(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_file(path: Path, *, overwrite: bool) -> None:
    """Raise StorageError if `path` exists, unless it may be overwritten."""
    if path.exists() and not overwrite:
        raise StorageError(f"{path}: exists already; choose another name, or allow overwriting")


def check_new_folder(path: Path) -> None:
    """Raise StorageError if `path` exists and is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StorageError(f"{path}: exists already and is not an empty folder; choose another name")


def write_file(path: Path, content: bytes) -> None:
    """Write a new file through to the disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise StorageError if the disk of `folder` cannot take `num_bytes` more."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror}") from error
    if free < num_bytes:
        raise StorageError(f"{folder}: needs {_gigabytes(num_bytes)} of free disk space, found {_gigabytes(free)}")


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(path: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{path}: the disk is full; nothing was left behind. Free some space and try again")
    return StorageError(f"{path}: cannot be written: {error.strerror or error}")


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
