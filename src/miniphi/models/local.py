"""Copying a model from a folder or a GGUF file of this machine. Does not know the cache or the network."""

import hashlib
from pathlib import Path

from miniphi.errors import DownloadError
from miniphi.models.cache import StoredFile
from miniphi.models.progress import Progress, ProgressBar
from miniphi.models.selection import choose_files
from miniphi.models.transfer import copy_stream, disk_errors, require_space

__all__ = ["fetch_from_path", "fingerprint"]

_GGUF_MAGIC = b"GGUF"


def fetch_from_path(path: Path, folder: Path, progress: bool | Progress) -> tuple[StoredFile, ...]:
    """Copy a GGUF file, or the model files of a folder, into `folder`; the original is only read."""
    try:
        return _copy_all(path, folder, progress)
    except PermissionError as error:
        raise DownloadError(f"{error.filename} cannot be read ({error.strerror})") from error


def fingerprint(path: Path) -> str:
    """Return a hash of the names, sizes and times of a model's files, so that a changed source is copied again."""
    root, names = _model_files(path)
    stats = [(name, (root / name).stat()) for name in names]
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _model_files(path: Path) -> tuple[Path, tuple[str, ...]]:
    if path.is_file():
        return path.parent, (path.name,)
    return path, choose_files([child.name for child in path.iterdir() if child.is_file()], where=str(path))


def _copy_all(path: Path, folder: Path, progress: bool | Progress) -> tuple[StoredFile, ...]:
    root, names = _model_files(path)
    sizes = {name: (root / name).stat().st_size for name in names}
    needed = sum(sizes.values())
    require_space(folder, needed)
    stored = []
    with disk_errors(folder, needed):
        for name, size in sizes.items():
            with (root / name).open("rb") as source, ProgressBar(progress, name, size) as bar:
                if name.endswith(".gguf"):
                    _require_gguf(source.read(len(_GGUF_MAGIC)), root / name)
                    source.seek(0)
                stored.append(copy_stream(source, folder / name, name=name, size=size, bar=bar))
    return tuple(stored)


def _require_gguf(start: bytes, path: Path) -> None:
    if start != _GGUF_MAGIC:
        raise DownloadError(f"{path} is not a GGUF file: it begins with {start!r}, expected {_GGUF_MAGIC!r}")
