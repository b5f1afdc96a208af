import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from miniphi.cli.conversation import load_conversation, save_conversation
from miniphi.engine import Batch
from miniphi.errors import InvalidRequestError, StorageError
from tests.fake_llm import EchoProgram, engine_of, make_llm, write_tiny_model

from .conftest import FakeModels, Run


def test_prompt_answers_once_and_exits(run: Run, models: FakeModels) -> None:
    result = run("chat", "--prompt", "Hello", "--temperature", "0")
    assert (result.code, result.out) == (0, "Hello\n")
    assert "AI" not in result.err


def test_an_empty_prompt_is_refused_before_anything_is_loaded(run: Run, models: FakeModels) -> None:
    result = run("chat", "--prompt", " ")
    assert result.code == 1
    assert result.error == "--prompt is empty; write what the model should answer"
    assert not models.loaded


def test_plain_lines_are_answered_until_the_end(run: Run, models: FakeModels) -> None:
    result = run("chat", stdin="first\n\nzweitens ß\n".encode())
    assert result.out == "first\nzweitens ß\n"
    assert result.code == 0
    assert "fake · context 2,048 tokens" in result.err
    assert "written by an AI and may be wrong" in result.err
    assert "\x1b" not in result.err


def test_the_model_is_an_argument(run: Run, models: FakeModels) -> None:
    run("chat", "some-model", "--context", "512", stdin=b"/quit\n")
    assert models.loaded[0][0] == "some-model"
    assert models.loaded[0][1]["context"] == 512
    assert not models.pulled


def test_quit_ends_the_chat(run: Run, models: FakeModels) -> None:
    assert run("chat", stdin=b"one\n/quit\ntwo\n").out == "one\n"


def test_several_lines_by_backslash_or_quotes(run: Run, models: FakeModels) -> None:
    assert run("chat", stdin=b"one\\\ntwo\\\nthree\n").out == "one\ntwo\nthree\n"
    assert run("chat", stdin=b'"""\none\n\ntwo\n"""\nnext\n').out == "one\n\ntwo\nnext\n"
    assert run("chat", stdin=b'"""one line"""\n').out == "one line\n"
    assert run("chat", stdin=b"never ended\\\n").out == "never ended\n\n"


def test_help_lists_the_commands(run: Run, models: FakeModels) -> None:
    result = run("chat", stdin=b"/help\n")
    for command in ("/system", "/reset", "/save", "/load", "/stats", "/quit", "Alt-Enter", "Ctrl-C"):
        assert command in result.err
    assert not result.out


def test_an_unknown_command_is_an_error_and_the_chat_goes_on(run: Run, models: FakeModels) -> None:
    result = run("chat", stdin=b"/fly\nstill here\n")
    assert "miniphi: error: /fly is not a command; /help lists them" in result.err
    assert result.out == "still here\n"
    assert result.code == 1, "nobody was there to see the error"


def test_save_and_load_keep_the_conversation(run: Run, models: FakeModels, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    run("chat", "--system", "Be brief.", stdin=f"one\ntwo\n/save {path}\n".encode())
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["model"] == "fake"
    assert document["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "two"},
    ]
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["chat.json"]
    again = tmp_path / "again.json"
    result = run("chat", stdin=f"/load {path}\nthree\n/save {again}\n".encode())
    assert "5 messages read" in result.err
    assert [message["content"] for message in load_conversation(again)][-2:] == ["three", "three"]


def test_system_and_reset(run: Run, models: FakeModels, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    run("chat", stdin=f"one\n/system Speak Latin.\n/reset\ntwo\n/save {path}\n".encode())
    assert [message["content"] for message in load_conversation(path)] == ["Speak Latin.", "two", "two"]
    run("chat", "--system", "x", stdin=f"/system\ntwo\n/save {path}\n".encode())
    assert [message["content"] for message in load_conversation(path)] == ["two", "two"]


def test_stats_tell_speed_and_tokens(run: Run, models: FakeModels) -> None:
    question = "x" * 50
    result = run("chat", stdin=f"/stats\n{question}\n/stats\n{question}\n/stats\n".encode())
    assert "no answer yet" in result.err
    assert "time to first token  0.0" in result.err
    assert "53 tokens, 0 of them cached" in result.err
    assert "157 tokens, 96 of them cached" in result.err
    assert "208 of 2,048 tokens" in result.err
    assert "tokens/s" in result.err


@pytest.mark.parametrize(("option", "guessed"), [((), True), (("--speculate", "off"), False)])
def test_stats_tell_what_was_guessed_ahead(
    run: Run, models: FakeModels, option: tuple[str, ...], *, guessed: bool
) -> None:
    models.llm = make_llm(draft_row_cost=0.0)
    result = run("chat", "--temperature", "0", *option, stdin=b"an answer like its question\n/stats\n")
    assert result.out == "an answer like its question\n"
    drafted, accepted = re.findall(r"guessed ahead +(\d+) tokens, (\d+) of them came true", result.err)[0]
    assert (int(drafted) >= int(accepted) > 10) if guessed else (drafted == accepted == "0")


def test_context_overflow_says_what_to_do_and_keeps_the_conversation(run: Run, models: FakeModels) -> None:
    models.llm = make_llm(context=64)
    result = run("chat", stdin=b"hello\n" + b"x" * 100 + b"\nbye\n")
    assert "the context is 64" in result.err
    assert "/reset forgets the conversation" in result.err
    assert result.out == "hello\nbye\n"


def test_a_full_context_is_explained(run: Run, models: FakeModels) -> None:
    models.llm = make_llm(context=64)
    assert "the context is full; /reset" in run("chat", stdin=b"x" * 40 + b"\n").err
    assert "start with a higher --max-tokens" in run("chat", "--max-tokens", "2", stdin=b"hello\n").err


@pytest.mark.parametrize(
    ("stdin", "expected"),
    [
        (b"/save\n", "/save needs a file name"),
        (b"/load\n", "/load needs a file name"),
        (b"/load /no/such/file\n", "/no/such/file: No such file or directory"),
        (b"/save /no/such/folder/x\n", "No such file or directory"),
    ],
)
def test_wrong_files_are_named_and_the_chat_goes_on(stdin: bytes, expected: str, run: Run, models: FakeModels) -> None:
    result = run("chat", stdin=stdin + b"go on\n")
    assert expected in result.err
    assert result.out == "go on\n"
    assert result.code == 1


def test_invalid_utf8_names_the_offset_in_the_whole_input(run: Run, models: FakeModels) -> None:
    result = run("chat", stdin=b"fine\nbad \xff\n")
    assert result.out == "fine\n"
    assert "standard input: invalid UTF-8 at byte offset 9 (0xff)" in result.err
    assert result.code == 1


class InterruptedOnce(EchoProgram):
    """Presses Ctrl-C inside one step."""

    countdown = 4

    def run(self, batch: Batch, *, reference: bool = False):  # type: ignore[no-untyped-def]
        self.countdown -= 1
        if self.countdown == 0:
            signal.raise_signal(signal.SIGINT)
        return super().run(batch)


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(run: Run, models: FakeModels, tmp_path: Path) -> None:
    models.llm = make_llm(InterruptedOnce)
    path = tmp_path / "chat.json"
    result = run("chat", stdin=f"a long answer\nand one more\n/save {path}\n".encode())
    assert result.out == "a l\nand one more\n"
    assert "(stopped)" in result.err
    contents = [message["content"] for message in load_conversation(path)]
    assert contents == ["a long answer", "a l", "and one more", "and one more"]
    assert not engine_of(models.llm).has_work


def test_ctrl_c_before_the_first_word_takes_the_question_back(run: Run, models: FakeModels, tmp_path: Path) -> None:
    class AtOnce(InterruptedOnce):
        countdown = 1

    models.llm = make_llm(AtOnce, max_batch_tokens=16)
    path = tmp_path / "chat.json"
    run("chat", stdin=f"{'long ' * 20}\nshort\n/save {path}\n".encode())
    assert [message["content"] for message in load_conversation(path)] == ["short", "short"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("not json", "not a JSON file"),
        ("[1]", 'has no "format"'),
        ('{"format": "miniphi-chat", "version": 2}', "version is 2"),
        ('{"format": "miniphi-chat", "version": 1}', "messages is not a list"),
        ('{"format": "miniphi-chat", "version": 1, "messages": [{"role": "user"}]}', r"messages\[0\]: expected"),
        (
            '{"format": "miniphi-chat", "version": 1, "messages": [{"role": "boss", "content": "x"}]}',
            r"messages\[0\]: role is 'boss'",
        ),
        (
            '{"format": "miniphi-chat", "version": 1, "messages": [{"role": "user", "content": 1}]}',
            r"messages\[0\]: content is not text",
        ),
        (
            '{"format": "miniphi-chat", "version": 1, "messages": '
            '[{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}',
            r"messages\[1\]: a system message can only be the first",
        ),
    ],
)
def test_files_that_are_no_conversation_are_refused(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidRequestError, match=expected):
        load_conversation(path)


def test_a_conversation_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat.json"
    save_conversation(path, "fake", [{"role": "user", "content": "before"}])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        save_conversation(path, "fake", [{"role": "user", "content": "after"}])
    assert load_conversation(path) == [{"role": "user", "content": "before"}]
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_while_waiting_for_input_is_quiet(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    chat = subprocess.Popen(
        [sys.executable, "-m", "miniphi", "chat", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with chat:
        assert chat.stderr is not None
        notices = [chat.stderr.readline() for _ in range(2)]
        assert "may be wrong" in notices[1]
        chat.send_signal(signal.SIGINT)
        out, err = chat.communicate(timeout=30)
    assert (chat.returncode, out, err) == (130, "", "")
