"""`miniphi serve`: a model behind an OpenAI-compatible HTTP server."""

import argparse

from miniphi.cli.options import DEFAULT_MODEL, add_engine_options, load_llm, positive_int
from miniphi.cli.terminal import UsageError, notice

__all__ = ["add_arguments", "run"]

DEFAULT_PORT = 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="a model's name or path (default: %(default)s)"
    )
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: %(default)s)"
    )
    group.add_argument(
        "--port", type=_port, default=DEFAULT_PORT, metavar="N", help="port; 0 takes a free one (default: %(default)s)"
    )
    group.add_argument(
        "--name", action="append", default=[], metavar="NAME", help="serve the model under this name; may be repeated"
    )
    group.add_argument(
        "--max-requests", type=positive_int, default=128, metavar="N", help="requests in flight (default: %(default)s)"
    )
    group.add_argument(
        "--drain",
        type=positive_int,
        default=30,
        metavar="SECONDS",
        help="what requests in flight have to end when the server is stopped (default: %(default)s)",
    )
    group.add_argument(
        "--step-ms",
        type=positive_int,
        default=250,
        metavar="MS",
        help="how long the prompt of one may hold up the tokens of others (default: %(default)s)",
    )
    group.add_argument(
        "--draft", metavar="MODEL", help="a smaller model with the same vocabulary, which guesses tokens ahead"
    )
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    try:
        from miniphi.server import ModelService, Server, ServiceLimits, bind
    except ImportError as error:
        raise UsageError(
            f"the server needs packages that are not here ({error.name}): pip install 'miniphi[serve]'"
        ) from None

    listener = bind(args.host, args.port)
    with listener:
        llm = load_llm(args, max_step_s=args.step_ms / 1000)
        limits = ServiceLimits(max_requests=args.max_requests)
        service = ModelService(llm, names=tuple(args.name), limits=limits)
        host, port = listener.getsockname()[:2]
        base = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        def say() -> None:
            notice(f"serving {', '.join(service.names)} at {base}/v1; its API at {base}/docs; Ctrl-C ends it")

        Server(service, drain_s=args.drain, on_ready=say).run(sockets=[listener])
    return 0


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; write a number from 0 to 65535")
    return int(text)
