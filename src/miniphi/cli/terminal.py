"""Terminal manners: what may be coloured, what may be printed, how progress is shown, how text is read."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from miniphi.errors import InvalidRequestError

__all__ = [
    "UsageError",
    "decode_utf8",
    "dim",
    "is_terminal",
    "notice",
    "print_table",
    "progress_bar",
    "read_text",
    "stdin_bytes",
    "write_answer",
]

_CONTROL = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if code not in (9, 10)
}


class UsageError(Exception):
    """The command line itself is wrong; ends the program with exit code 2."""


def is_terminal(stream: TextIO | None) -> bool:
    """Say whether somebody is watching the stream; False for a closed one."""
    return stream is not None and not stream.closed and stream.isatty()


def dim(text: str, stream: TextIO) -> str:
    """Return `text` in a faint colour where the stream is a terminal and the user has not refused colours."""
    if is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        return f"\x1b[2m{text}\x1b[0m"
    return text


def notice(text: str) -> None:
    """Tell the user something that is not part of the answer."""
    print(dim(text, sys.stderr), file=sys.stderr, flush=True)


def write_answer(text: str) -> None:
    """Print model output at once; on a terminal a model cannot send control characters (cursor, title, clipboard)."""
    sys.stdout.write(text.translate(_CONTROL) if is_terminal(sys.stdout) else text)
    sys.stdout.flush()


@contextmanager
def progress_bar(description: str, *, unit: str) -> Iterator[Callable[[int, int | None, str], None]]:
    """Show a progress bar on stderr, or nothing where stderr is not a terminal.

    The value is a function of (done, total or None, text behind the bar).
    """
    from tqdm import tqdm

    # disable=None lets tqdm be silent away from a terminal.
    with tqdm(desc=description, unit=unit, unit_scale=True, disable=None, dynamic_ncols=True, leave=False) as bar:

        def update(done: int, total: int | None, text: str = "") -> None:
            bar.total = total
            bar.set_postfix_str(text, refresh=False)
            bar.update(done - bar.n)

        yield update


def decode_utf8(data: bytes, source: str, *, start: int = 0) -> str:
    """Decode `data`, which begins at byte `start` of `source`.

    Raises:
        InvalidRequestError: invalid UTF-8; the message names the source and the offset of the first bad byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte offset {start + error.start} (0x{data[error.start]:02x})"
        raise InvalidRequestError(f"{source}: invalid UTF-8 at {where}; convert the text to UTF-8") from None


def stdin_bytes() -> bytes:
    """Read standard input to its end."""
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("standard input is closed; give the prompt as an argument or with --file")
    return sys.stdin.buffer.read()


def read_text(path: str) -> str:
    """Read a UTF-8 text file, or standard input for "-"."""
    if path == "-":
        return decode_utf8(stdin_bytes(), "standard input")
    return decode_utf8(Path(path).read_bytes(), path)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns; a column of numbers is aligned to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    is_number = [bool(rows) and all(row[column][:1].isdigit() for row in rows) for column in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ]
        print("  ".join(cells).rstrip())
