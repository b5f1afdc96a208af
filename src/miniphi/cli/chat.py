"""`miniphi chat`: talk to a model in the terminal, or with --prompt get one answer."""

import argparse
from contextlib import closing
from typing import TYPE_CHECKING

from miniphi.cli.options import (
    DEFAULT_MODEL,
    add_engine_options,
    add_sampling_options,
    load_llm,
    sampling_params,
)
from miniphi.cli.terminal import notice, write_answer
from miniphi.errors import InvalidRequestError

if TYPE_CHECKING:
    from miniphi.engine import SamplingParams
    from miniphi.llm import LLM

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="a model's name or path (default: %(default)s)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once and exit")
    parser.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    add_sampling_options(parser)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    sampling = sampling_params(args)
    if args.prompt is not None and not args.prompt.strip():
        raise InvalidRequestError("--prompt is empty; write what the model should answer")
    llm = load_llm(args)
    if args.prompt is not None:
        return _answer_once(llm, sampling, args.system, args.prompt)

    from miniphi.cli.chat_input import open_message_reader
    from miniphi.cli.chat_session import ChatSession
    from miniphi.models import cache_dir

    notice(f"{llm.name} · context {llm.context:,} tokens · /help lists the commands, Ctrl-D quits")
    notice("Answers are written by an AI and may be wrong.")
    return ChatSession(llm, sampling, args.system).run(open_message_reader(cache_dir() / "chat_history"))


def _answer_once(llm: "LLM", sampling: "SamplingParams", system: str | None, prompt: str) -> int:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    with closing(llm.chat(messages, stream=True, sampling=sampling)) as stream:
        for chunk in stream:
            write_answer(chunk.text)
    write_answer("\n")
    return 0
