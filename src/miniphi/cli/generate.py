"""`miniphi generate`: one prompt in, one answer out."""

import argparse
import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from miniphi.cli.options import (
    DEFAULT_MODEL,
    add_engine_options,
    add_sampling_options,
    load_llm,
    sampling_params,
)
from miniphi.cli.terminal import UsageError, is_terminal, read_text, write_answer
from miniphi.errors import InvalidRequestError

if TYPE_CHECKING:
    from miniphi.engine import SamplingParams
    from miniphi.llm import LLM, Completion, CompletionStream

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt; - or nothing reads standard input")
    parser.add_argument("--file", "-f", metavar="FILE", help="read the prompt from a UTF-8 text file")
    parser.add_argument(
        "--model", "-m", default=DEFAULT_MODEL, metavar="MODEL", help="a model's name or path (default: %(default)s)"
    )
    parser.add_argument("--raw", action="store_true", help="continue the prompt as plain text, without the chat format")
    parser.add_argument("--system", metavar="TEXT", help="instructions that come before the prompt (not with --raw)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the whole result as one JSON object")
    output.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the answer while it is written (default: yes, except with --json or --n above 1)",
    )
    output.add_argument("--n", type=int, default=1, metavar="N", help="write N answers (default: %(default)s)")
    output.add_argument(
        "--logprobs", type=int, metavar="N", help="report each token's log-probability and N alternatives (with --json)"
    )
    add_sampling_options(parser)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    streams = _check_output_options(args)
    sampling = sampling_params(args, n=args.n, logprobs=args.logprobs)
    prompt = _read_prompt(args)
    llm = load_llm(args)
    if streams:
        with closing(_open_stream(llm, args, prompt, sampling)) as stream:
            _print_stream(stream)
        return 0
    _print_completion(_complete(llm, args, prompt, sampling), as_json=args.json)
    return 0


def _check_output_options(args: argparse.Namespace) -> bool:
    """Return whether to stream. Raises UsageError for options that exclude each other."""
    if args.raw and args.system is not None:
        raise UsageError("--system belongs to the chat format and --raw leaves that out; drop one of them")
    if args.stream and (args.json or args.n > 1):
        raise UsageError("--stream prints one plain answer; drop it, or drop --json and --n")
    if args.logprobs is not None and not args.json:
        raise UsageError("--logprobs is part of the JSON result; add --json")
    return not args.json and args.n <= 1 if args.stream is None else bool(args.stream)


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.file is not None:
        raise UsageError("found both a prompt and --file; give one of them")
    if args.file is not None:
        source, prompt = args.file, read_text(args.file)
    elif args.prompt in (None, "-"):
        if is_terminal(sys.stdin):
            raise UsageError("no prompt; give it as an argument, with --file, or on standard input")
        source, prompt = "standard input", read_text("-")
    else:
        return _checked("the prompt", args.prompt)
    # Editors and echo end a text with a line end that is not meant as part of the prompt.
    return _checked(source, prompt.removesuffix("\n").removesuffix("\r"))


def _checked(source: str, prompt: str) -> str:
    if not prompt.strip():
        raise InvalidRequestError(f"{source} is empty; write what the model should answer")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{source} has invalid UTF-8 at character {error.start}; convert it to UTF-8"
        ) from None
    return prompt


def _messages(args: argparse.Namespace, prompt: str) -> list[dict[str, str]]:
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": prompt}]


def _open_stream(llm: "LLM", args: argparse.Namespace, prompt: str, sampling: "SamplingParams") -> "CompletionStream":
    if args.raw:
        return llm.complete(prompt, stream=True, sampling=sampling)
    return llm.chat(_messages(args, prompt), stream=True, sampling=sampling)


def _complete(llm: "LLM", args: argparse.Namespace, prompt: str, sampling: "SamplingParams") -> "Completion":
    if args.raw:
        return llm.complete(prompt, sampling=sampling)
    return llm.chat(_messages(args, prompt), sampling=sampling)


def _print_stream(stream: "CompletionStream") -> None:
    last = ""
    for chunk in stream:
        write_answer(chunk.text)
        last = chunk.text or last
    if not last.endswith("\n"):
        write_answer("\n")


def _print_completion(completion: "Completion", *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(completion.to_dict(), ensure_ascii=False))
        return
    for choice in completion.choices:
        if len(completion.choices) > 1:
            write_answer(f"--- answer {choice.index + 1} of {len(completion.choices)} ---\n")
        write_answer(choice.text if choice.text.endswith("\n") else choice.text + "\n")
