"""Fetching a model's files from the hub over plain HTTP, resumable at the byte and checked against the hub's hashes.

The `huggingface_hub` library supplies the API, the address scheme, the token and the HTTP client. The bytes are read
here, because since version 2 the library deletes what an interrupted download has written, and a 5 GB file would start
again from nothing. Nothing is known here about the cache beyond the folder that is filled.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import httpx2
from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented there, but not in an `__all__`
    build_hf_headers,
    hf_raise_for_status,
)

from miniphi.errors import DownloadError
from miniphi.models.cache import INCOMPLETE, StoredFile
from miniphi.models.entries import HubSource
from miniphi.models.progress import Progress, ProgressBar
from miniphi.models.selection import choose_files
from miniphi.models.transfer import CHUNK_BYTES, disk_errors, finish_file, require_space

__all__ = ["fetch_from_hub"]

# Pauses between attempts that bring no new byte; an attempt that brings one starts the row again.
RETRY_DELAYS_S = (1.0, 2.0, 4.0)
_DEFAULT_TIMEOUT_S = 10.0
# In place of the library's own, which lists what else is installed.
_USER_AGENT = {"user-agent": "miniphi"}
_ADVICE = {
    401: "set HF_TOKEN to a token that may read it",
    403: "set HF_TOKEN to a token that may read it",
    404: "check the name, and HF_ENDPOINT if it is set",
}
_RETRIED_STATUS = frozenset({408, 416, 429, 500, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class _RemoteFile:
    """A file of one commit. `sha256` is known for large files, `git_sha1` (of git's blob object) for all others."""

    name: str
    url: str
    size: int
    sha256: str | None
    git_sha1: str | None

    @property
    def partial_name(self) -> str:
        # The hash in the name keeps a partial file of one commit from being continued with another's bytes.
        return f"{self.name}.{(self.sha256 or self.git_sha1 or '')[:12]}{INCOMPLETE}"


class _Digest:
    """Both hashes of a file as its bytes go by."""

    def __init__(self, remote: _RemoteFile) -> None:
        self._remote = remote
        self.restart()

    def restart(self) -> None:
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % self._remote.size, usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        self._sha256.update(chunk)
        if self._remote.sha256 is None:
            self._git.update(chunk)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def matches(self) -> bool:
        if self._remote.sha256 is not None:
            return self.sha256 == self._remote.sha256
        return self._git.hexdigest() == self._remote.git_sha1


def fetch_from_hub(
    source: HubSource, file: str | None, folder: Path, progress: bool | Progress
) -> tuple[tuple[StoredFile, ...], str]:
    """Fill `folder` with a model's files and return them with the commit they are from; an earlier try is continued."""
    with _hub_errors(source):
        commit, remotes = _list_files(source, file)
        _drop_strangers(folder, remotes)
        needed = sum(remote.size for remote in remotes)
        require_space(folder, needed - sum(_present_bytes(folder, remote) for remote in remotes))
        with disk_errors(folder, needed):
            return tuple(_fetch_file(remote, folder, progress) for remote in remotes), commit


def _list_files(source: HubSource, file: str | None) -> tuple[str, list[_RemoteFile]]:
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    api = HfApi(endpoint=endpoint, headers=_USER_AGENT)
    timeout = _timeout_s("HF_HUB_ETAG_TIMEOUT")
    try:
        info = api.model_info(source.repo, revision=source.revision, files_metadata=True, timeout=timeout)
    except HFValidationError as error:
        raise DownloadError(f"{source.repo!r} is not a hub id; expected 'org/name'") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DownloadError(
            f"the answer for {source.repo} is not a hub's ({_reason(error)}): check HF_ENDPOINT"
        ) from error
    if info.sha is None:
        raise DownloadError(f"the hub did not say which commit {source.repo}@{source.revision} is; try again later")
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    remotes = []
    for path in choose_files(siblings, wanted=file, where=f"{source.repo}@{source.revision}"):
        sibling = siblings[path]
        # Only a .gguf can lie in a folder of its repository, and it is taken alone: its own name is enough here.
        name = PurePosixPath(path).name
        size, sha256 = sibling.size, sibling.lfs.sha256 if sibling.lfs else None
        if size is None or (sha256 is None and sibling.blob_id is None):
            raise DownloadError(f"the hub gave no size or no hash of {name} in {source.repo}, so it cannot be checked")
        url = hf_hub_url(source.repo, path, revision=info.sha, endpoint=endpoint)
        remotes.append(_RemoteFile(name=name, url=url, size=size, sha256=sha256, git_sha1=sibling.blob_id))
    return info.sha, remotes


def _drop_strangers(folder: Path, remotes: list[_RemoteFile]) -> None:
    """Delete what an earlier try for another commit left behind."""
    expected = {name for remote in remotes for name in (remote.name, remote.partial_name)}
    for path in list(folder.iterdir()):
        if path.name not in expected:
            path.unlink()


def _present_bytes(folder: Path, remote: _RemoteFile) -> int:
    for name in (remote.name, remote.partial_name):
        if (folder / name).is_file():
            return (folder / name).stat().st_size
    return 0


def _fetch_file(remote: _RemoteFile, folder: Path, progress: bool | Progress) -> StoredFile:
    target, partial = folder / remote.name, folder / remote.partial_name
    if target.is_file():
        # Finished by an earlier try: it goes through the same check as a partial file that is all there.
        target.replace(partial)
    digest = _Digest(remote)
    with ProgressBar(progress, remote.name, remote.size) as bar, partial.open("a+b") as output:
        _hash_present(output, digest, bar)
        _continue_download(remote, output, digest, bar)
        finish_file(output)
    if not digest.matches():
        partial.unlink()
        expected = remote.sha256 or f"git blob {remote.git_sha1}"
        raise DownloadError(
            f"{remote.name} arrived corrupted (expected {expected}, got sha256 {digest.sha256}) and was deleted: "
            "run the same pull again"
        )
    partial.replace(target)
    return StoredFile(name=remote.name, size=remote.size, sha256=digest.sha256)


def _hash_present(output: IO[bytes], digest: _Digest, bar: ProgressBar) -> None:
    output.seek(0)
    while chunk := output.read(CHUNK_BYTES):
        digest.update(chunk)
        bar.advance(len(chunk))


def _continue_download(remote: _RemoteFile, output: IO[bytes], digest: _Digest, bar: ProgressBar) -> None:
    """Fetch until the file has its size; a broken connection is taken up again from the last byte."""
    failures = 0
    while (done := output.seek(0, os.SEEK_END)) < remote.size:
        try:
            _stream(remote, output, digest, bar)
            reason = "the server closed the connection early"
        except httpx2.TransportError as error:
            reason = _reason(error)
        except HfHubHTTPError as error:
            if error.response.status_code not in _RETRIED_STATUS:
                raise
            reason = f"HTTP status {error.response.status_code}"
        reached = output.seek(0, os.SEEK_END)
        failures = 0 if reached > done else failures + 1
        if reached < remote.size and failures > len(RETRY_DELAYS_S):
            raise DownloadError(
                f"the download of {remote.name} stopped at {reached:,} of {remote.size:,} bytes ({reason}): "
                "check the network and run the same pull again, it goes on from there"
            )
        if failures:
            time.sleep(RETRY_DELAYS_S[failures - 1])


def _stream(remote: _RemoteFile, output: IO[bytes], digest: _Digest, bar: ProgressBar) -> None:
    done = output.seek(0, os.SEEK_END)
    # Compressed answers have no byte positions to resume from.
    headers = build_hf_headers(headers={**_USER_AGENT, "accept-encoding": "identity"})
    if done:
        headers["range"] = f"bytes={done}-"
    timeout = _timeout_s("HF_HUB_DOWNLOAD_TIMEOUT")
    with get_session().stream("GET", remote.url, headers=headers, timeout=timeout) as response:
        if done and response.status_code in (200, 416):
            # The server does not resume, or has fewer bytes than are here: begin again.
            output.truncate(0)
            digest.restart()
            bar.advance(-done)
            done = 0
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            done += len(chunk)
            if done > remote.size:
                output.truncate(0)
                raise DownloadError(
                    f"the server sent more than the {remote.size:,} bytes of {remote.name}; try again later"
                )
            output.write(chunk)
            digest.update(chunk)
            bar.advance(len(chunk))


def _timeout_s(variable: str) -> float:
    text = os.environ.get(variable, "")
    return float(text) if text.isdigit() and int(text) else _DEFAULT_TIMEOUT_S


@contextmanager
def _hub_errors(source: HubSource) -> Iterator[None]:
    """Turn the library's errors into one line that says what to do."""
    what = f"{source.repo}@{source.revision}"
    try:
        yield
    except GatedRepoError as error:
        raise DownloadError(
            f"{source.repo} is gated: accept its terms on its page of the hub, then set HF_TOKEN to your token"
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadError(
            f"{source.repo} has no revision {source.revision!r} on the hub: check its branches and tags"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"the hub has no model {source.repo!r}, or it is private: check the name, or set HF_TOKEN to your token"
        ) from error
    except OfflineModeIsEnabled as error:
        raise DownloadError(f"{what} cannot be fetched while HF_HUB_OFFLINE is set: unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = _ADVICE.get(status, "try again later")
        raise DownloadError(f"the hub answered {what} with HTTP status {status}: {advice}") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise DownloadError(
            f"no connection to the hub for {what} ({_reason(error)}): check the network, the proxy and HF_ENDPOINT, "
            "or pull from a local folder or file"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
