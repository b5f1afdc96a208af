import io

import pytest

from miniphi.cli.terminal import dim, is_terminal, print_table, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert dim("note", Terminal()) == "\x1b[2mnote\x1b[0m"
    assert dim("note", io.StringIO()) == "note"
    monkeypatch.setenv("NO_COLOR", "1")
    assert dim("note", Terminal()) == "note"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert dim("note", Terminal()) == "note"


def test_a_closed_or_missing_stream_is_no_terminal() -> None:
    stream = Terminal()
    assert is_terminal(stream)
    stream.close()
    assert not is_terminal(stream)
    assert not is_terminal(None)


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        with progress_bar("work", unit="B") as update:
            update(5, 10, "half")
        assert ("work" in stream.getvalue()) == stream.isatty()


def test_numbers_are_aligned_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["NAME", "SIZE"], [["a", "5"], ["long name", "1234"]])
    assert capsys.readouterr().out == "NAME       SIZE\na             5\nlong name  1234\n"
