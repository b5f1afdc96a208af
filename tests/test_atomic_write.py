from pathlib import Path

import pytest

from miniphi.atomic_write import atomic_file, atomic_folder, check_free_space, write_file
from miniphi.errors import StorageError


def test_a_file_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with atomic_file(path, overwrite=False) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("problem", [ValueError("no"), KeyboardInterrupt()])
def test_a_file_vanishes_on_any_error(tmp_path: Path, problem: BaseException) -> None:
    (tmp_path / "x").write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(tmp_path / "x", overwrite=True) as file:
            file.write(b"half")
            raise problem

    with pytest.raises(type(problem)):
        write_half()
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"

    def write_half() -> None:
        with atomic_folder(target) as folder:
            write_file(folder / "a", b"1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list((tmp_path / "deep").iterdir()) == []
    target.mkdir()  # an empty folder may be replaced
    with atomic_folder(target) as folder:
        write_file(folder / "a", b"1")
    assert (target / "a").read_bytes() == b"1"
    with pytest.raises(StorageError, match="not an empty folder"), atomic_folder(target):
        pass


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"), atomic_file(tmp_path / "no" / "x", overwrite=False):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), atomic_folder(tmp_path / "file" / "x"):
        pass


def test_free_space_is_checked(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1)
    with pytest.raises(StorageError, match=r"needs 1000000000\.00 GB of free disk space, found"):
        check_free_space(tmp_path, 10**18)
