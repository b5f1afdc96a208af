"""A model is copied after its first answer, started from the copy later, and never from a wrong one."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import miniphi
from miniphi import LLM, UnsupportedModelError
from miniphi.checkpoint import checkpoint as door
from miniphi.errors import StorageError
from miniphi.llm.packed_copy import BackgroundWriter, PackedCopy
from miniphi.models import packed_copy_bytes, packed_copy_dir, remove_packed_copies
from tests.fake_llm import write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


@pytest.fixture(autouse=True)
def writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BackgroundWriter]]:
    """Turn copies on in a cache of this test's own, and know who writes to it."""
    monkeypatch.setenv("MINIPHI_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MINIPHI_PACKED_COPY")
    started: list[BackgroundWriter] = []
    start = BackgroundWriter.start

    def note(writer: BackgroundWriter) -> None:
        started.append(writer)
        start(writer)

    monkeypatch.setattr(BackgroundWriter, "start", note)
    yield started
    for writer in started:
        writer.finish()


@pytest.fixture
def sources_opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The model files that were read instead of a copy."""
    opened: list[Path] = []
    open_folder = door.open_hf_folder
    monkeypatch.setattr(door, "open_hf_folder", lambda path: opened.append(path) or open_folder(path))
    return opened


def num_copies() -> int:
    return len(list(packed_copy_dir().glob("*.packed")))


def answer(llm: LLM) -> tuple[int, ...]:
    completion = llm.chat([{"role": "user", "content": "the cat</s>"}], seed=3, temperature=1.0, max_tokens=12)
    return completion.choices[0].token_ids


def load_and_answer(folder: Path, writers: list[BackgroundWriter], **options: object) -> tuple[int, ...]:
    tokens = answer(miniphi.load(folder, **options))  # type: ignore[arg-type]
    for writer in writers:
        writer.finish()
    return tokens


def test_the_second_start_uses_the_copy(
    folder: Path, writers: list[BackgroundWriter], sources_opened: list[Path]
) -> None:
    expected = load_and_answer(folder, writers)
    assert num_copies() == len(writers) == len(sources_opened) == 1
    progress: list[int] = []
    llm = miniphi.load(folder, on_progress=progress.append)
    assert answer(llm) == expected
    assert len(sources_opened) == len(writers) == 1
    assert llm.template is not None
    assert llm.template.source == "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    assert not list(packed_copy_dir().glob("*.partial"))


def test_nothing_is_written_before_the_first_answer(folder: Path, writers: list[BackgroundWriter]) -> None:
    llm = miniphi.load(folder)
    stream = llm.complete("the cat", stream=True, max_tokens=3, ignore_eos=True)
    next(iter(stream))
    assert not writers
    list(stream)
    assert len(writers) == 1
    answer(llm)
    assert len(writers) == 1


@pytest.mark.parametrize("changed", ["tokenizer_config.json", "model.safetensors", "config.json"])
def test_a_changed_source_replaces_the_copy(
    changed: str, folder: Path, writers: list[BackgroundWriter], sources_opened: list[Path]
) -> None:
    expected = load_and_answer(folder, writers)
    status = (folder / changed).stat()
    os.utime(folder / changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert load_and_answer(folder, writers) == expected
    assert len(sources_opened) == len(writers) == 2
    assert num_copies() == 1
    assert load_and_answer(folder, writers) == expected
    assert len(sources_opened) == 2


def test_changed_content_of_equal_size_and_time_is_noticed(folder: Path, writers: list[BackgroundWriter]) -> None:
    load_and_answer(folder, writers)
    path = folder / "tokenizer_config.json"
    status = path.stat()
    path.write_text(path.read_text().replace("messages %}", "messages-%}"))
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy = PackedCopy.of(folder)
    assert copy is not None
    assert copy.open() is None


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:100] + b"?" + b[101:], lambda b: b""])
def test_a_damaged_copy_is_replaced(
    damage: Callable[[bytes], bytes], folder: Path, writers: list[BackgroundWriter], sources_opened: list[Path]
) -> None:
    expected = load_and_answer(folder, writers)
    (path,) = packed_copy_dir().glob("*.packed")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert load_and_answer(folder, writers) == expected
    assert len(sources_opened) == 2
    assert path.read_bytes() == whole


def test_copies_can_be_turned_off(
    folder: Path, writers: list[BackgroundWriter], sources_opened: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_and_answer(folder, writers, packed_copy=False)
    monkeypatch.setenv("MINIPHI_PACKED_COPY", "0")
    assert load_and_answer(folder, writers) == expected
    assert not packed_copy_dir().exists()
    monkeypatch.delenv("MINIPHI_PACKED_COPY")
    load_and_answer(folder, writers)
    load_and_answer(folder, writers, packed_copy=False)
    assert len(sources_opened) == 4


def test_a_cache_that_cannot_be_written_is_one_notice(folder: Path, writers: list[BackgroundWriter]) -> None:
    packed_copy_dir().parent.mkdir()
    packed_copy_dir().write_text("a file is in the way")
    notices: list[str] = []
    load_and_answer(folder, writers, on_notice=notices.append)
    assert len(notices) == 1
    assert "no packed copy" in notices[0]
    assert "MINIPHI_PACKED_COPY=0" in notices[0]
    load_and_answer(folder, writers)


def test_a_full_disk_is_one_notice(
    folder: Path, writers: list[BackgroundWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    notices: list[str] = []
    load_and_answer(folder, writers, on_notice=notices.append)
    assert len(notices) == 1
    assert "free disk space" in notices[0]
    assert not list(packed_copy_dir().iterdir())


def test_useless_files_go_when_a_copy_is_written(folder: Path, tmp_path: Path, writers: list[BackgroundWriter]) -> None:
    other = write_tiny_model(tmp_path / "other")
    load_and_answer(other, writers)
    (gone,) = packed_copy_dir().glob("other-*.packed")
    shutil.rmtree(other)
    old, new, garbage, foreign = (
        packed_copy_dir() / name for name in (".a.partial", ".b.partial", "c.packed", "d.txt")
    )
    for path in (old, new, garbage, foreign):
        path.write_text("x")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    load_and_answer(folder, writers)
    assert [path.exists() for path in (gone, old, new, garbage, foreign)] == [False, False, True, False, True]
    assert num_copies() == 1


def test_models_of_one_name_have_copies_of_their_own(
    folder: Path, tmp_path: Path, writers: list[BackgroundWriter]
) -> None:
    twin = shutil.copytree(folder, tmp_path / "elsewhere" / "tiny")
    load_and_answer(folder, writers)
    load_and_answer(twin, writers)
    assert num_copies() == 2


def test_a_damaged_model_is_still_an_error(folder: Path, writers: list[BackgroundWriter]) -> None:
    load_and_answer(folder, writers)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="model_type"):
        miniphi.load(folder)


def test_ctrl_c_at_the_end_abandons_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()

    def write_until_stopped(should_stop: Callable[[], bool]) -> None:
        while not should_stop():
            time.sleep(0.01)
        stopped.set()

    notices: list[str] = []
    writer = BackgroundWriter(write_until_stopped, is_busy=lambda: False, on_notice=notices.append)
    monkeypatch.setattr("miniphi.llm.packed_copy._PATIENCE_S", 0.01)

    def interrupt(text: str) -> None:
        notices.append(text)
        raise KeyboardInterrupt

    writer._on_notice = interrupt
    writer.start()
    writer.finish()
    assert stopped.is_set()
    assert len(notices) == 1
    assert "packed copy" in notices[0]


def test_what_the_job_raises_is_told(writers: list[BackgroundWriter]) -> None:
    def fail(should_stop: Callable[[], bool]) -> None:
        raise StorageError("the disk is full")

    notices: list[str] = []
    writer = BackgroundWriter(fail, is_busy=lambda: False, on_notice=notices.append)
    writer.start()
    writer.finish()
    assert notices == ["no packed copy for faster starts: the disk is full (MINIPHI_PACKED_COPY=0 turns copies off)"]


def test_a_writer_waits_while_the_engine_works() -> None:
    is_busy = threading.Event()
    is_busy.set()
    asked, answers = threading.Event(), []

    def job(should_stop: Callable[[], bool]) -> None:
        asked.set()
        answers.append(should_stop())

    writer = BackgroundWriter(job, is_busy=is_busy.is_set, on_notice=None)
    writer.start()
    assert asked.wait(10)
    time.sleep(0.1)
    assert not answers
    is_busy.clear()
    writer.finish()
    assert answers == [False]


def test_copies_can_be_removed_while_one_is_in_use(folder: Path, writers: list[BackgroundWriter]) -> None:
    expected = load_and_answer(folder, writers)
    assert packed_copy_bytes() > 2 << 20
    llm = miniphi.load(folder)
    remove_packed_copies()
    assert packed_copy_bytes() == num_copies() == 0
    assert answer(llm) == expected
    remove_packed_copies()
