"""What a user's words for a model mean: a path, a catalog name, a hub id, or the name of something in the cache.

Owns the grammar `NAME[@REVISION]`, `ORG/NAME[@REVISION]`, `ORG/NAME/FILE.gguf[@REVISION]` and finding the files of a
model on this machine. Does not fetch anything.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from miniphi.errors import DownloadError, InvalidRequestError
from miniphi.models.cache import installed_folder
from miniphi.models.entries import (
    DEFAULT_REVISION,
    CatalogEntry,
    HubSource,
    WheelSource,
    catalog,
    find_entry,
    split_revision,
)

__all__ = ["ModelReference", "is_local", "model_file", "parse_reference", "resolve"]

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """A model by name: what it is called in the cache, and where it comes from (None: only this machine has it)."""

    name: str
    source: HubSource | WheelSource | None
    revision: str | None = None
    file: str | None = None


def resolve(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Return the files of a model on this machine: a folder with safetensors, or one .gguf file. Fetches nothing.

    Takes a path, a catalog name, a hub id `org/name`, or any name that `pull` gave. An existing path wins.

    Raises: DownloadError when the model is not here; the message names the command that fetches it.
    """
    path = Path(name_or_path).expanduser()
    if is_local(name_or_path, revision):
        return model_file(path)
    reference = parse_reference(str(name_or_path), revision)
    folder = installed_folder(reference.name)
    if folder is None and reference.source is None:
        find_entry(reference.name)
    if folder is None:
        raise DownloadError(
            f"{reference.name} is not on this machine, or not complete: run `miniphi pull {reference.name}`"
        )
    return model_file(folder)


def is_local(name_or_path: str | os.PathLike[str], revision: str | None = None) -> bool:
    """Tell whether a path is meant, and raise if it is absent; a catalog name is a path only if a model lies there."""
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if revision is not None:
        return False
    if text and path.exists():
        return text not in catalog() or path.is_file() or _holds_model(path)
    if isinstance(name_or_path, os.PathLike) or text.startswith((".", "~", os.sep)) or not text:
        raise DownloadError(f"there is no file or folder {text!r}")
    return False


def model_file(path: Path) -> Path:
    """Return what a checkpoint is opened by: a folder with safetensors, or a .gguf file, the only one of its folder."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise DownloadError(f"{path} is not a model file: expected a .gguf file or a folder with *.safetensors")
        return path
    if any(path.glob("*.safetensors")):
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        listed = ", ".join(file.name for file in ggufs[:8])
        raise DownloadError(f"{path} holds {len(ggufs)} .gguf files ({listed}): name one of them")
    raise DownloadError(f"{path} holds no model: expected *.safetensors with config.json, or one .gguf file")


def parse_reference(text: str, revision: str | None = None) -> ModelReference:
    """Read `NAME[@REVISION]`, `ORG/NAME[@REVISION]` or `ORG/NAME/FILE.gguf[@REVISION]`."""
    if "://" in text:
        hub_id = "/".join(text.split("://", 1)[1].split("/")[1:3])
        hint = f"such as {hub_id!r}" if _HUB_ID.fullmatch(hub_id) else "'org/name'"
        raise InvalidRequestError(f"{text!r} is a URL: give the hub id, {hint}")
    bare, revision = split_revision(text, revision)
    if "/" not in bare:
        return _from_catalog(find_entry(bare, revision)) if bare in catalog() else _unlisted(bare, revision)
    repo = "/".join(bare.split("/")[:2])
    file = bare[len(repo) + 1 :] or None
    if not _HUB_ID.fullmatch(repo) or (file is not None and not file.endswith(".gguf")):
        raise InvalidRequestError(f"{text!r} is not a model: expected a hub id 'org/name' or 'org/name/FILE.gguf'")
    known = _entry_of(repo, revision) if file is None else None
    if known is not None:
        return _from_catalog(known)
    name = bare if revision is None else f"{bare}@{revision}"
    source = HubSource(repo=repo, revision=revision or DEFAULT_REVISION)
    return ModelReference(name=name, source=source, revision=revision, file=file)


def _from_catalog(entry: CatalogEntry) -> ModelReference:
    return ModelReference(name=entry.key, source=entry.source, revision=entry.revision)


def _unlisted(name: str, revision: str | None) -> ModelReference:
    return ModelReference(name=name if revision is None else f"{name}@{revision}", source=None, revision=revision)


def _entry_of(repo: str, revision: str | None) -> CatalogEntry | None:
    """Return the catalog's entry for a hub repository, so that one model is not stored under two names."""
    for name in catalog():
        entry = find_entry(name)
        if isinstance(entry.source, HubSource) and entry.source.repo.lower() == repo.lower():
            return find_entry(name, revision) if revision in (None, DEFAULT_REVISION, *entry.revisions) else None
    return None


def _holds_model(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf"))
