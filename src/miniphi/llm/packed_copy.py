"""The packed copy of a model in the cache: where it lies, what it was made from, and writing it without being noticed.

A copy is written after the first answer of a model, by a thread that gives way to everybody else, and used by every
later start. Owns this policy; the file's format is engine/packed_file.py's.

    <cache>/.packed/<name>-<hash of the source's path>.packed     one for each source, replaced when the source changes
"""

import atexit
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from miniphi.config import ModelConfig
from miniphi.engine.packed_file import PackedModel, read_packed_file, read_packed_identity, write_packed_file
from miniphi.engine.weights import ModelWeights
from miniphi.errors import CapacityError, CheckpointError, DownloadError, StorageError
from miniphi.models.cache import packed_copy_dir
from miniphi.tokenizer import Tokenizer
from miniphi.version import __version__

__all__ = ["BackgroundWriter", "PackedCopy", "SavedModel"]

SWITCH = "MINIPHI_PACKED_COPY"
_SUFFIX = ".packed"
_PARTIAL = ".partial"
_HEAD_BYTES = 1 << 16  # of every source file, enough to tell two versions of equal size and time apart
_SOURCE_SUFFIXES = (".gguf", ".safetensors", ".json", ".jinja")
_ABANDONED_S = 3600.0  # nobody writes a copy for so long
_GLANCE_S = 0.02  # how soon a writer that waits for an answer to be finished goes on
_PATIENCE_S = 1.0  # of somebody who waits for the end of the program, before being told why


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What a start needs of a model besides its configuration and weights."""

    tokenizer: Tokenizer
    chat_template: str | None
    eos_token_ids: tuple[int, ...]


class PackedCopy:
    """The packed copy that belongs to one model's files, whether it exists or not."""

    def __init__(self, source: Path) -> None:
        """`source` is a GGUF file or a folder with safetensors. Raises DownloadError, OSError if there is none."""
        source = source.resolve()
        self._identity = _identity(source)
        self.path = packed_copy_dir() / f"{source.stem}-{zlib.crc32(os.fsencode(source)):08x}{_SUFFIX}"

    @classmethod
    def of(cls, source: Path) -> "PackedCopy | None":
        """Return the copy of these files, or None where there can be none: MINIPHI_PACKED_COPY=0, or no cache."""
        if os.environ.get(SWITCH, "1").lower() in ("0", "off", "no", "false"):
            return None
        try:
            return cls(source)
        except (OSError, DownloadError):
            return None

    def open(self) -> tuple[PackedModel, SavedModel] | None:
        """Return the model if there is a copy of exactly these files for exactly these kernels; else None."""
        try:
            packed = read_packed_file(self.path, identity=self._identity)
            return packed, _restore(packed.attachments)
        except (CheckpointError, CapacityError):
            return None

    def write(
        self, config: ModelConfig, weights: ModelWeights, saved: SavedModel, should_stop: Callable[[], bool]
    ) -> None:
        """Write the copy, and delete those whose source is gone. Raises StorageError."""
        rest = {"chat_template": saved.chat_template, "eos_token_ids": saved.eos_token_ids}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _discard_useless(self.path.parent)
        except OSError as error:
            raise StorageError(f"{self.path.parent}: cannot be written: {error.strerror}") from None
        write_packed_file(
            self.path,
            config,
            weights,
            identity=self._identity,
            attachments={"tokenizer": saved.tokenizer.save(), "rest": json.dumps(rest).encode()},
            should_stop=should_stop,
        )


class BackgroundWriter:
    """Runs one writing job in a thread that gives way, and lets the program end only when it is done or refused."""

    def __init__(
        self,
        job: Callable[[Callable[[], bool]], None],
        *,
        is_busy: Callable[[], bool],
        on_notice: Callable[[str], None] | None,
    ) -> None:
        """`job` gets a function that tells it to stop, which it asks often; that waits while `is_busy`.

        `on_notice` gets a line for the user.
        """
        self._job = job
        self._is_busy = is_busy
        self._on_notice = on_notice or (lambda text: None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="miniphi-packed-copy", daemon=True)

    def start(self) -> None:
        """Begin to write. The program's end waits for it; Ctrl-C then leaves the copy unwritten."""
        self._thread.start()
        atexit.register(self.finish)

    def finish(self) -> None:
        """Wait until the copy is written; on Ctrl-C, until it is abandoned."""
        try:
            self._thread.join(_PATIENCE_S)
            if self._thread.is_alive():
                self._on_notice(
                    "keeping a packed copy of the model, so that it starts at once next time (Ctrl-C: don't)"
                )
                self._thread.join()
        except KeyboardInterrupt:
            self._stop.set()
            self._thread.join()

    def _run(self) -> None:
        try:
            self._job(self._should_stop)
        except StorageError as error:
            self._on_notice(f"no packed copy for faster starts: {error} ({SWITCH}=0 turns copies off)")
        finally:
            del self._job, self._is_busy  # and with them the weights

    def _should_stop(self) -> bool:
        # A lower priority would not do: on a busy machine the program's end would wait for it for minutes.
        while self._is_busy() and not self._stop.wait(_GLANCE_S):
            pass
        return self._stop.is_set()


def _identity(source: Path) -> Mapping[str, object]:
    """Return what tells this state of a model's files from any other, and the program that reads them."""
    files = [source]
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix in _SOURCE_SUFFIXES)
    described: list[object] = []
    for path in files:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            described.append([path.name, status.st_size, status.st_mtime_ns, zlib.crc32(file.read(_HEAD_BYTES))])
    return {"miniphi": __version__, "source": str(source), "files": described}


def _restore(attachments: Mapping[str, bytes]) -> SavedModel:
    try:
        rest = json.loads(attachments["rest"])
        return SavedModel(
            tokenizer=Tokenizer.from_saved(attachments["tokenizer"]),
            chat_template=rest["chat_template"],
            eos_token_ids=tuple(rest["eos_token_ids"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"a packed copy lacks {error}") from None


def _discard_useless(folder: Path) -> None:
    """Delete copies whose source is gone or that cannot be read, and what a killed process left half written."""
    for path in folder.iterdir():
        if path.suffix == _PARTIAL:
            is_useless = time.time() - path.stat().st_mtime > _ABANDONED_S
        elif path.suffix == _SUFFIX:
            is_useless = not _has_source(path)
        else:
            continue
        if is_useless:
            path.unlink(missing_ok=True)


def _has_source(path: Path) -> bool:
    try:
        return Path(str(read_packed_identity(path)["source"])).exists()
    except (CheckpointError, KeyError):
        return False
