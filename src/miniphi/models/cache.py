"""Where models live on this machine: one folder per model under the cache, finished by a `miniphi.json` manifest.

Owns the layout, the manifests, and installing and removing as one step each. Does not know where files come from.

    <cache>/<name>[@<revision>]/              a finished model: its files and `miniphi.json`, written last
    <cache>/<name>[@<revision>].incomplete/   a pull under way, or interrupted and kept to be resumed
    <cache>/.locks/                           one lock file per model, so that two pulls do not meet
    <cache>/.packed/                          copies in the kernels' own layout, for fast starts (llm/packed_copy.py)
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from miniphi.atomic_write import atomic_file
from miniphi.errors import DownloadError, InvalidRequestError

__all__ = [
    "INCOMPLETE",
    "MANIFEST_NAME",
    "InstalledModel",
    "Manifest",
    "Provenance",
    "StoredFile",
    "cache_dir",
    "install",
    "installed",
    "installed_folder",
    "packed_copy_bytes",
    "packed_copy_dir",
    "read_manifest",
    "remove",
    "remove_packed_copies",
]

MANIFEST_NAME = "miniphi.json"
INCOMPLETE = ".incomplete"

_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]*(?<!\.incomplete)")


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file of a model: its name inside the folder, its size in bytes, and its sha256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a model came from: a source such as `hub:org/name`, the revision asked for, and the commit it meant.

    The commit of a local source is a fingerprint of its files' names, sizes and times.
    """

    source: str
    revision: str | None = None
    commit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `miniphi.json` says. Its presence means that every file is there and was checked."""

    name: str
    provenance: Provenance
    files: tuple[StoredFile, ...]
    time: str


@dataclass(frozen=True, kw_only=True)
class InstalledModel:
    """A finished model in the cache."""

    name: str
    path: Path
    bytes: int
    source: str
    revision: str | None


def cache_dir() -> Path:
    """Return the folder that holds the models: $MINIPHI_HOME, else $XDG_CACHE_HOME/miniphi, else ~/.cache/miniphi."""
    chosen = os.environ.get("MINIPHI_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    user_cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    if os.path.isabs(user_cache):
        return Path(user_cache, "miniphi")
    try:
        return Path.home() / ".cache" / "miniphi"
    except RuntimeError as error:
        raise DownloadError("this user has no home folder; set MINIPHI_HOME to where models are to be kept") from error


def packed_copy_dir() -> Path:
    """Return the folder of the packed copies, which need not exist. Everything in it may be deleted at any time."""
    return cache_dir() / ".packed"


def packed_copy_bytes() -> int:
    """Return the bytes of all packed copies."""
    return sum(_size(path) or 0 for path in packed_copy_dir().glob("*.packed"))


def remove_packed_copies() -> None:
    """Delete all packed copies. Whoever has one mapped keeps it until it ends."""
    for path in packed_copy_dir().glob("*.packed"):
        path.unlink(missing_ok=True)


def installed() -> list[InstalledModel]:
    """Return every finished model in the cache, sorted by name; a folder without a valid manifest is not one."""
    models = []
    folders = sorted(cache_dir().iterdir()) if cache_dir().is_dir() else []
    for folder in folders:
        if folder.name.startswith(".") or folder.name.endswith(INCOMPLETE):
            continue
        manifest = read_manifest(folder)
        if manifest is None:
            continue
        origin = manifest.provenance
        size = sum(file.size for file in manifest.files)
        models.append(
            InstalledModel(name=manifest.name, path=folder, bytes=size, source=origin.source, revision=origin.revision)
        )
    return models


def installed_folder(name: str) -> Path | None:
    """Return the folder of a finished model whose files all have their recorded sizes, or None."""
    folder = _folder(name)
    manifest = read_manifest(folder)
    if manifest is None or any(_size(folder / file.name) != file.size for file in manifest.files):
        return None
    return folder


def remove(name: str) -> None:
    """Delete a model, and what is left of an interrupted pull of it, from the cache."""
    folder = _folder(name)
    staging = _staging_folder(folder)
    if not folder.is_dir() and not staging.is_dir():
        known = ", ".join(model.name for model in installed()) or "none"
        raise DownloadError(f"{name!r} is not in the cache; installed models: {known}")
    with _lock(name):
        for path in (staging, folder):
            _discard(path)


def install(
    name: str,
    provenance: Provenance,
    fetch: Callable[[Path], tuple[tuple[StoredFile, ...], str | None]],
    *,
    is_resumable: bool,
    force: bool,
) -> Path:
    """Run `fetch` in a staging folder and move the result into the cache as one step; return the model's folder.

    `fetch` fills the folder it is given and returns its files and the commit they are from. A model that is there
    already, from the same source and commit, is returned at once unless `force`. What an interrupted fetch leaves is
    kept only if it is resumable.
    """
    folder = _folder(name)
    with _lock(name):
        found = None if force else installed_folder(name)
        if found is not None and _is_current(found, provenance):
            return found
        staging = _staging_folder(folder)
        staging.mkdir(parents=True, exist_ok=True)
        try:
            files, commit = fetch(staging)
        except BaseException:
            if not is_resumable or not any(staging.iterdir()):
                _discard(staging)
            raise
        origin = Provenance(source=provenance.source, revision=provenance.revision, commit=commit)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        _write_manifest(staging, Manifest(name=name, provenance=origin, files=files, time=now))
        _discard(folder)
        staging.rename(folder)
        return folder


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a model's folder; None if there is none or it is not one."""
    try:
        data = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = tuple(StoredFile(**file) for file in data["files"])
        return Manifest(name=data["name"], provenance=Provenance(**data["provenance"]), files=files, time=data["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    with atomic_file(folder / MANIFEST_NAME, overwrite=True) as file:
        file.write(json.dumps(asdict(manifest), indent=2).encode())


def _is_current(folder: Path, provenance: Provenance) -> bool:
    """Tell whether a finished model is the one asked for; another one under the same name is an error."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    there = manifest.provenance
    if there.source != provenance.source:
        raise DownloadError(
            f"{manifest.name} is already in the cache, from {there.source}, and was asked for from "
            f"{provenance.source}: pull with --force to replace it, or give the new one another name"
        )
    return provenance.commit in (None, there.commit)


def _discard(folder: Path) -> None:
    """Delete a folder; its manifest goes first, so that an interruption leaves no model that looks finished."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


def _staging_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + INCOMPLETE)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _folder(name: str) -> Path:
    """Return where the model of this name belongs; the hub's `org/name` becomes one folder name."""
    folder_name = name.replace("/", "--")
    if not _FOLDER_NAME.fullmatch(folder_name):
        raise InvalidRequestError(
            f"{name!r} is not a model name: expected letters, digits, '.', '-' and '_', and not a path"
        )
    return cache_dir() / folder_name


@contextmanager
def _lock(name: str) -> Iterator[None]:
    import filelock  # noqa: PLC0415 - only pulling and removing pay for it

    locks = cache_dir() / ".locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(locks / f"{_folder(name).name}.lock", timeout=0)
        lock.acquire()
    except filelock.Timeout as error:
        raise DownloadError(f"another process is pulling or removing {name}; wait for it, then try again") from error
    except OSError as error:
        raise DownloadError(
            f"the cache {cache_dir()} cannot be written ({error.strerror}); set MINIPHI_HOME to a folder that can"
        ) from error
    try:
        yield
    finally:
        lock.release()
