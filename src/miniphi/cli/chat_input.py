"""Reading what the user types in a chat: a prompt_toolkit line editor on a terminal, plain lines anywhere else.

Both give whole messages: a message goes on to the next line after a backslash at the end of a line, and between two
lines of three double quotes. On a terminal Alt-Enter starts a new line too.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from miniphi.cli.terminal import decode_utf8, is_terminal

__all__ = ["open_message_reader", "read_message"]

PROMPT = "> "
CONTINUATION = ". "
BLOCK = '"""'

LineReader = Callable[[str], str | None]
"""Takes the prompt to show and returns the next line without its end, or None at the end of the input."""


def read_message(read_line: LineReader) -> str | None:
    """Read the next message, which may have several lines; None at the end of the input."""
    line = read_line(PROMPT)
    if line is None:
        return None
    if line.lstrip().startswith(BLOCK):
        return _read_block(line.lstrip().removeprefix(BLOCK), read_line)
    lines = []
    while line is not None and line.endswith("\\"):
        lines.append(line[:-1])
        line = read_line(CONTINUATION)
    return "\n".join([*lines, line or ""])


def _read_block(first: str, read_line: LineReader) -> str:
    lines: list[str] = []
    line: str | None = first
    while line is not None:
        if line.rstrip().endswith(BLOCK):
            lines.append(line.rstrip().removesuffix(BLOCK))
            break
        lines.append(line)
        line = read_line(CONTINUATION)
    return "\n".join(lines).strip("\n")


def open_message_reader(history: Path) -> LineReader:
    """Return the reader that fits this terminal; `history` keeps what was typed, for the line editor only."""
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        return _line_editor(history)
    return _plain_lines()


def _line_editor(history: Path) -> LineReader:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history.parent.mkdir(parents=True, exist_ok=True)
    if not history.exists():
        os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))  # what people ask is private
    session: PromptSession[str] = PromptSession(history=FileHistory(str(history)), key_bindings=bindings)

    def read_line(prompt: str) -> str | None:
        try:
            return session.prompt(prompt, prompt_continuation=CONTINUATION)
        except EOFError:
            return None

    return read_line


def _plain_lines() -> LineReader:
    offset = 0

    def read_line(prompt: str) -> str | None:
        nonlocal offset
        if sys.stdin is None:  # closed before the program started
            return None
        if is_terminal(sys.stdin):  # somebody types, but the output goes elsewhere
            print(prompt, end="", file=sys.stderr, flush=True)
        data = sys.stdin.buffer.readline()
        if not data:
            return None
        start, offset = offset, offset + len(data)
        return decode_utf8(data, "standard input", start=start).rstrip("\r\n")

    return read_line
