"""`miniphi perplexity`: how well a model predicts a text."""

import argparse
import json
from typing import TYPE_CHECKING

from miniphi.cli.options import DEFAULT_MODEL, add_engine_options, load_llm, positive_int
from miniphi.cli.terminal import progress_bar, read_text
from miniphi.errors import InvalidRequestError

if TYPE_CHECKING:
    from miniphi.llm import Perplexity

__all__ = ["add_arguments", "run"]

# The bar counts in parts of the text.
_PARTS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("file", metavar="FILE", help="a UTF-8 text file; - reads standard input")
    parser.add_argument(
        "--model", "-m", default=DEFAULT_MODEL, metavar="MODEL", help="a model's name or path (default: %(default)s)"
    )
    parser.add_argument(
        "--window", type=positive_int, metavar="N", help="tokens the model sees at once (default: 2048, or the context)"
    )
    parser.add_argument(
        "--stride",
        type=positive_int,
        metavar="N",
        help="tokens from one window to the next; fewer give each token more context (default: window)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    text = read_text(args.file)
    if not text:
        raise InvalidRequestError(f"{args.file} is empty; give a text to measure on")
    llm = load_llm(args)
    with progress_bar("perplexity", unit="") as update:

        def show(running: "Perplexity", done: float) -> None:
            update(round(done * _PARTS), _PARTS, f"perplexity {running.perplexity:.4f}")

        result = llm.perplexity(text, window=args.window, stride=args.stride, on_progress=show)
    if args.json:
        print(json.dumps({"model": llm.name, **result.to_dict()}))
    else:
        print(f"perplexity {result.perplexity:.4f} over {result.num_tokens:,} tokens ({llm.name})")
    return 0
