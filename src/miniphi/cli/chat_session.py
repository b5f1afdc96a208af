"""The conversation of `miniphi chat`: its messages, its commands, and an answer that Ctrl-C can stop."""

import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from miniphi.cli.chat_input import LineReader, read_message
from miniphi.cli.conversation import load_conversation, save_conversation
from miniphi.cli.terminal import is_terminal, notice, write_answer
from miniphi.errors import ContextLengthError, InvalidRequestError, MiniphiError

if TYPE_CHECKING:
    from miniphi.engine import SamplingParams
    from miniphi.llm import LLM, Timings, Usage

__all__ = ["ChatSession"]

HELP = (
    ("/system TEXT", "give the model instructions; without TEXT, take them away"),
    ("/reset", "forget the conversation (the instructions stay)"),
    ("/save FILE", "write the conversation to a JSON file"),
    ("/load FILE", "go on with a conversation from such a file"),
    ("/stats", "speed and tokens of the last answer"),
    ("/help", "this list"),
    ("/quit", "leave (Ctrl-D does too)"),
)
HINTS = (
    "Ctrl-C stops an answer; what was written stays in the conversation.",
    'For several lines press Alt-Enter, or end a line with \\, or put the text between two lines of """.',
)


class ChatSession:
    """A conversation with one model, driven by the messages that a reader gives."""

    def __init__(self, llm: "LLM", sampling: "SamplingParams", system: str | None) -> None:
        self._llm = llm
        self._sampling = sampling
        self._system = system or None
        self._messages: list[dict[str, str]] = []
        self._usage: Usage | None = None
        self._timings: Timings | None = None
        self._has_failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/help": lambda _: notice(_help()),
        }

    def run(self, read_line: LineReader) -> int:
        """Answer messages until /quit or the end of the input.

        Returns 1 if something failed and nobody was there to see it, so that scripts can tell; otherwise 0.
        """
        while True:
            try:
                message = read_message(read_line)
            except KeyboardInterrupt:
                if not is_terminal(sys.stdin):
                    raise
                notice("Ctrl-D or /quit leaves the chat")
                continue
            if message is None or message.strip() == "/quit":
                break
            self._handle(message)
        return int(self._has_failed and not is_terminal(sys.stdin))

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, instructions first."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *self._messages]

    def _handle(self, message: str) -> None:
        name, _, argument = message.strip().partition(" ")
        try:
            if not name.startswith("/"):
                self._answer(message)
            elif name in self._commands:
                self._commands[name](argument.strip())
            else:
                raise InvalidRequestError(f"{name} is not a command; /help lists them")
        except ContextLengthError as error:
            self._fail(f"{error}. /reset forgets the conversation and makes room")
        except MiniphiError as error:
            self._fail(str(error))
        except BrokenPipeError:
            raise
        except OSError as error:
            self._fail(f"{error.filename or name}: {error.strerror or error}")

    def _fail(self, message: str) -> None:
        self._has_failed = True
        print("miniphi: error: " + " ".join(message.splitlines()), file=sys.stderr, flush=True)

    def _answer(self, text: str) -> None:
        if not text.strip():
            return
        question = {"role": "user", "content": text}
        parts: list[str] = []
        reason: str | None = None
        with closing(self._llm.chat([*self.messages, question], stream=True, sampling=self._sampling)) as stream:
            self._messages.append(question)
            try:
                for chunk in stream:
                    parts.append(chunk.text)
                    write_answer(chunk.text)
                    reason = chunk.finish_reason or reason
            except KeyboardInterrupt:
                reason = "interrupted"
            finally:
                if parts or reason != "interrupted":
                    self._messages.append({"role": "assistant", "content": "".join(parts)})
                else:  # nothing was said yet: as if it had not been asked
                    self._messages.pop()
                self._usage, self._timings = stream.usage, stream.timings
        write_answer("\n")
        self._explain(reason)

    def _explain(self, reason: str | None) -> None:
        """Say why an answer ended before its end."""
        if reason == "interrupted":
            notice("(stopped)")
        elif reason == "length" and self._context_used() >= self._llm.context:
            notice("(the context is full; /reset forgets the conversation and makes room)")
        elif reason == "length":
            notice("(cut at the limit of an answer; ask the model to go on, or start with a higher --max-tokens)")

    def _context_used(self) -> int:
        return 0 if self._usage is None else self._usage.total_tokens

    def _set_system(self, text: str) -> None:
        self._system = text or None
        notice("instructions set" if text else "instructions taken away")

    def _reset(self, _: str) -> None:
        self._messages.clear()
        self._usage = self._timings = None
        notice("the conversation is forgotten")

    def _save(self, argument: str) -> None:
        path = _path(argument, "/save")
        save_conversation(path, self._llm.name, self.messages)
        notice(f"{len(self.messages)} messages written to {path}")

    def _load(self, argument: str) -> None:
        path = _path(argument, "/load")
        messages = load_conversation(path)
        has_system = bool(messages) and messages[0]["role"] == "system"
        self._system = messages[0]["content"] if has_system else None
        self._messages = messages[int(has_system) :]
        self._usage = self._timings = None
        notice(f"{len(messages)} messages read from {path}")

    def _stats(self, _: str) -> None:
        if self._usage is None or self._timings is None:
            notice("no answer yet")
            return
        usage, timings = self._usage, self._timings
        seconds = "-" if timings.time_to_first_token_s is None else f"{timings.time_to_first_token_s:.2f} s"
        notice(
            f"time to first token  {seconds}\n"
            f"prompt               {usage.prompt_tokens} tokens, {usage.cached_tokens} of them cached, "
            f"{_rate(timings.prompt_tokens_per_s)}\n"
            f"answer               {usage.completion_tokens} tokens, {_rate(timings.completion_tokens_per_s)}\n"
            f"guessed ahead        {timings.drafted_tokens} tokens, {timings.accepted_tokens} of them came true\n"
            f"context              {usage.total_tokens:,} of {self._llm.context:,} tokens"
        )


def _help() -> str:
    """Return the list of commands, wrapped between words to the terminal's width."""
    width = max(30, shutil.get_terminal_size().columns - 1)
    commands = [
        textwrap.fill(text, width, initial_indent=f"{name:15}", subsequent_indent=" " * 15) for name, text in HELP
    ]
    return "\n".join([*commands, "", *(textwrap.fill(hint, width) for hint in HINTS)])


def _rate(tokens_per_s: float | None) -> str:
    return "too short to time" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise InvalidRequestError(f"{command} needs a file name, for example {command} chat.json")
    return Path(argument).expanduser()
