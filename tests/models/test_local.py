import hashlib
import json
import os
from pathlib import Path

import pytest

from miniphi.errors import DownloadError, InvalidRequestError
from miniphi.models import cache_dir, installed, pull, remove, resolve

GGUF = b"GGUF" + bytes(range(200)) * 5000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "my-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(GGUF[::-1])
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    (model / "modeling.py").write_text("raise SystemExit")
    (model / "notes").mkdir()
    return model


def test_where_models_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPHI_HOME", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("MINIPHI_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "miniphi"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "miniphi"


def test_a_folder_is_copied_without_pickles_and_code(folder: Path, cache: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    copied = pull(folder, progress=lambda name, done, total: seen.append((name, done, total)))
    assert copied == cache / "my-model" == resolve("my-model")
    assert sorted(os.listdir(copied)) == ["config.json", "miniphi.json", "model.safetensors", "tokenizer.json"]
    assert (copied / "model.safetensors").read_bytes() == GGUF[::-1]
    assert (copied / "model.safetensors").stat().st_ino != (folder / "model.safetensors").stat().st_ino
    assert [name for name, done, total in seen if done == total] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    manifest = json.loads((copied / "miniphi.json").read_text())
    assert manifest["provenance"]["source"] == f"file:{folder}"
    assert {file["name"]: file["sha256"] for file in manifest["files"]}["model.safetensors"] == hashlib.sha256(
        GGUF[::-1]
    ).hexdigest()
    (model,) = installed()
    assert (model.name, model.path, model.source) == ("my-model", copied, f"file:{folder}")
    assert model.bytes == len(GGUF) + 2 + 18


def test_a_second_pull_copies_only_what_changed(folder: Path) -> None:
    copied = pull(folder)
    before = (copied / "model.safetensors").stat().st_ino
    assert pull(folder) == copied
    assert (copied / "model.safetensors").stat().st_ino == before
    (folder / "config.json").write_text('{"a": 1}')
    pull(folder)
    assert (copied / "config.json").read_text() == '{"a": 1}'


def test_a_gguf_file_is_copied_and_can_be_named(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "Tiny.Q4_1.gguf"
    file.write_bytes(GGUF)
    assert pull(str(file)) == cache / "Tiny.Q4_1" / "Tiny.Q4_1.gguf"
    assert pull(file, name="tiny") == cache / "tiny" / "Tiny.Q4_1.gguf" == resolve("tiny")
    assert [model.name for model in installed()] == ["Tiny.Q4_1", "tiny"]
    remove("tiny")
    assert [model.name for model in installed()] == ["Tiny.Q4_1"]
    assert file.read_bytes() == GGUF


def test_a_finished_model_can_be_copied_under_another_name(folder: Path, cache: Path) -> None:
    copied = pull(pull(folder), name="second")
    assert copied == cache / "second" == resolve("second")
    assert json.loads((copied / "miniphi.json").read_text())["name"] == "second"


def test_the_name_of_another_model_is_not_taken_over(folder: Path, tmp_path: Path) -> None:
    pull(folder)
    other = tmp_path / "elsewhere" / "my-model.gguf"
    other.parent.mkdir()
    other.write_bytes(GGUF)
    with pytest.raises(DownloadError, match=r"my-model is already in the cache, from file:.*pull with --force"):
        pull(other)
    assert pull(other, force=True).read_bytes() == GGUF
    assert not (cache_dir() / "my-model" / "config.json").exists()


def test_resolve_takes_paths_as_they_are(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(folder) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("my-model") == Path("my-model")
    file = tmp_path / "a.gguf"
    file.write_bytes(GGUF)
    assert resolve("a.gguf") == Path("a.gguf")
    assert resolve(file) == file
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "b.gguf").write_bytes(GGUF)
    assert resolve(lone) == lone / "b.gguf"
    (lone / "c.gguf").write_bytes(GGUF)
    with pytest.raises(DownloadError, match=r"holds 2 \.gguf files \(b\.gguf, c\.gguf\): name one of them"):
        resolve(lone)


def test_a_folder_called_like_a_catalog_model_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m-instruct").mkdir()
    with pytest.raises(DownloadError, match="run `miniphi pull smollm2-135m-instruct`"):
        resolve("smollm2-135m-instruct")
    (tmp_path / "smollm2-135m-instruct" / "m.gguf").write_bytes(GGUF)
    assert resolve("smollm2-135m-instruct") == Path("smollm2-135m-instruct/m.gguf")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("phi-3-mini-128k-instruct", DownloadError, "run `miniphi pull phi-3-mini-128k-instruct`"),
        ("phi-3-mini-128k-instruct@april-2024", DownloadError, "`miniphi pull phi-3-mini-128k-instruct@april-2024`"),
        ("org/name", DownloadError, "run `miniphi pull org/name`"),
        ("org/name@v1", DownloadError, "run `miniphi pull org/name@v1`"),
        ("smolm", InvalidRequestError, "did you mean smollm2-135m-instruct"),
        ("./nothing", DownloadError, "there is no file or folder './nothing'"),
        ("", DownloadError, "there is no file or folder ''"),
        ("org/name/file.bin", InvalidRequestError, "expected a hub id"),
        ("a/../b", InvalidRequestError, "expected a hub id"),
        ("phi-3-mini-128k-instruct@may", InvalidRequestError, "known: main, april-2024"),
    ],
)
def test_what_is_not_here_says_how_to_get_it(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        resolve(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_models(tmp_path: Path, folder: Path, cache: Path) -> None:
    text = tmp_path / "readme.md"
    text.write_text("hello")
    fake = tmp_path / "fake.gguf"
    fake.write_text("hello")
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, message in [
        (text, "is not a model file"),
        (fake, r"is not a GGUF file: it begins with b'hell'"),
        (empty, "holds no model"),
    ]:
        with pytest.raises(DownloadError, match=message):
            pull(source)
    (folder / "config.json").unlink()
    with pytest.raises(DownloadError, match=r"safetensors and no config\.json"):
        pull(folder)
    with pytest.raises(DownloadError, match="there is no file or folder"):
        pull(tmp_path / "absent.gguf")
    assert installed() == []
    assert not [path for path in cache.rglob("*") if path.suffix in (".gguf", ".incomplete")]


@pytest.mark.parametrize("name", ["../up", "a b", "", ".hidden", "x.incomplete", "-x"])
def test_a_name_cannot_leave_the_cache(folder: Path, name: str) -> None:
    file = folder / "model.gguf"
    file.write_bytes(GGUF)
    if name:
        with pytest.raises(InvalidRequestError, match="is not a model name"):
            pull(file, name=name)
    with pytest.raises(InvalidRequestError, match="is not a model name"):
        remove(name)


def test_a_failed_or_interrupted_copy_leaves_nothing(folder: Path, cache: Path) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if name == "model.safetensors":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(folder, progress=interrupt)
    assert [path.name for path in cache.iterdir()] == [".locks"]
    pull(folder)

    with pytest.raises(KeyboardInterrupt):
        pull(folder, progress=interrupt, force=True)
    assert resolve("my-model") == cache / "my-model"


def test_a_model_whose_files_were_damaged_is_not_used(folder: Path) -> None:
    copied = pull(folder)
    (copied / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InvalidRequestError, match="no model 'my-model'"):
        resolve("my-model")
    pull(folder)
    assert resolve("my-model") == copied
    (copied / "miniphi.json").write_text("{}")
    assert installed() == []


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "blocker"
    blocker.write_text("")
    monkeypatch.setenv("MINIPHI_HOME", str(blocker / "cache"))
    with pytest.raises(DownloadError, match=r"cannot be written .*set MINIPHI_HOME"):
        pull(folder)


def test_only_local_sources_can_be_renamed() -> None:
    with pytest.raises(InvalidRequestError, match="keeps its own name"):
        pull("org/name", name="other")


def test_a_bar_on_a_terminal_is_drawn_and_closed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pull(folder, progress=True)
    assert capsys.readouterr().out == ""
