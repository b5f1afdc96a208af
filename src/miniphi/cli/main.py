"""The `miniphi` command: finds the subcommand, runs it, and turns every failure into one line and an exit code.

A subcommand lives in the module of its name in this room, which has `add_arguments(parser)` and `run(args) -> int`
and imports what it needs inside `run`: only the chosen command is ever imported, so `--help` stays instant.
"""

import argparse
import errno
import gc
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import miniphi
from miniphi.cli.terminal import UsageError
from miniphi.errors import MiniphiError

__all__ = ["COMMANDS", "build_parser", "main"]

COMMANDS = {
    "chat": "talk to a model in the terminal",
    "generate": "answer one prompt, from an argument, a file or standard input",
    "serve": "serve a model to OpenAI clients over HTTP",
    "models": "list the known models and those on this machine",
    "pull": "fetch a model and check it",
    "show": "show a model's card: what it is, what it is for, what it cannot do",
    "plan": "say whether a model fits into this machine's memory, and with which context",
    "quantize": "write a smaller copy of a model and report the error it introduces",
    "perplexity": "measure how well a model predicts a text file",
    "bench": "measure prefill and decode speed against this machine's limits",
}

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; only `command`'s own options are filled in, because only its module is imported."""
    parser = _Parser(
        prog="miniphi",
        description="Run small language models on the machine you have.",
        epilog="`miniphi COMMAND --help` describes a command. MINIPHI_DEBUG=1 shows the traceback of a failure.",
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"miniphi {miniphi.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for name, summary in COMMANDS.items():
        description = summary[0].upper() + summary[1:] + "."
        subparser = subparsers.add_parser(
            name, help=summary, description=description, allow_abbrev=False, formatter_class=_Formatter
        )
        if name == command:
            importlib.import_module(f"miniphi.cli.{name}").add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _spare_start_up()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer must not fail on a terminal that lacks a character
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        return _abandon_stdout()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        return _report(error)
    return code


def _spare_start_up() -> None:
    """Leave out work at start-up that no command needs."""
    # Our kernels compute; NumPy's linear algebra would start its threads when it is imported, and never be used.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Modules and vocabularies are hundreds of thousands of objects that stay: do not search them for garbage meanwhile.
    gc.set_threshold(100_000)


def _run(arguments: list[str]) -> int:
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        args = build_parser(command).parse_args(arguments)
    except SystemExit as done:  # argparse has printed --help or --version
        return int(done.code or 0)
    code: int = importlib.import_module(f"miniphi.cli.{args.command}").run(args)
    return code


def _report(error: Exception) -> int:
    """Print the failure as one line on stderr (after the traceback when MINIPHI_DEBUG=1) and return the exit code."""
    if os.environ.get("MINIPHI_DEBUG") == "1":
        traceback.print_exception(error)
    code = EXIT_FAILURE
    if isinstance(error, UsageError):
        message, code = str(error), EXIT_USAGE
    elif isinstance(error, MiniphiError):
        message = str(error)
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        remedy = "; free some space and try again" if error.errno == errno.ENOSPC else ""
        message = f"{where}{error.strerror or error}{remedy}"
    elif isinstance(error, MemoryError):
        message = "this machine ran out of memory; `miniphi plan` shows what a model needs"
    else:
        message = f"unexpected {type(error).__name__}: {error}; run again with MINIPHI_DEBUG=1 and report the traceback"
    print("miniphi: error: " + " ".join(message.splitlines()), file=sys.stderr)
    return code


def _abandon_stdout() -> int:
    """Point stdout at nothing after its reader has gone, so that the interpreter's last flush stays silent."""
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
    except io.UnsupportedOperation:  # stdout is not a file: it is being captured, and there is nothing to silence
        pass
    return EXIT_FAILURE
