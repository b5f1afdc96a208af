"""Which files of a repository or folder make up a model. Pure: names in, names out."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from miniphi.errors import DownloadError
from miniphi.models.cache import MANIFEST_NAME

__all__ = ["choose_files"]

_TOKENIZER_FILES = frozenset({"tokenizer.model", "tokenizer.gguf", "merges.txt", "vocab.txt"})
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def choose_files(names: Iterable[str], *, wanted: str | None = None, where: str) -> tuple[str, ...]:
    """Return the files to take, sorted: one .gguf, or the safetensors at the top with their JSON and tokenizer files.

    `wanted` names a .gguf; without it, safetensors come first and a .gguf is taken only if it is the only one. Pickles
    and code are never taken. `where` is what messages call the place.
    """
    names = sorted(names)
    ggufs = [name for name in names if name.endswith(".gguf")]
    if wanted is not None:
        if wanted not in ggufs:
            raise DownloadError(f"{where} has no file {wanted!r}; its .gguf files: {', '.join(ggufs) or 'none'}")
        return _safe([wanted], where)
    top = [name for name in names if "/" not in name and not name.startswith(".")]
    weights = [name for name in top if name.endswith(".safetensors")]
    # Some repositories carry the same weights twice; the `model*` files are the ones that Hugging Face loaders read.
    weights = [name for name in weights if name.startswith("model")] or weights
    if weights:
        if "config.json" not in top:
            raise DownloadError(f"{where} has safetensors and no config.json, so its shape is unknown")
        return _safe(weights + [name for name in top if _describes(name)], where)
    if len(ggufs) == 1:
        return _safe(ggufs, where)
    if ggufs:
        listed = ", ".join(ggufs[:8]) + (", ..." if len(ggufs) > 8 else "")
        raise DownloadError(f"{where} has {len(ggufs)} .gguf files ({listed}): name one of them, as in NAME/{ggufs[0]}")
    if any(name.endswith(_PICKLES) for name in top):
        raise DownloadError(f"{where} has only pickled weights, which can run code; miniphi reads safetensors and GGUF")
    raise DownloadError(f"{where} holds no model: expected *.safetensors with config.json, or a .gguf file")


def _describes(name: str) -> bool:
    if name in _TOKENIZER_FILES or name.endswith(".jinja"):
        return True
    # An index of pickled shards describes files that are not taken; a manifest describes the copy it lies in.
    return name.endswith(".json") and not name.endswith(".bin.index.json") and name != MANIFEST_NAME


def _safe(names: list[str], where: str) -> tuple[str, ...]:
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise DownloadError(f"{where} has a file called {name!r}, which would leave the model's folder")
    return tuple(sorted(names))
