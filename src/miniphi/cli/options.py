"""Options that several commands share, and the values they stand for."""

import argparse
import re
from typing import TYPE_CHECKING, Any

from miniphi.cli.terminal import UsageError, notice
from miniphi.errors import DownloadError, InvalidRequestError

if TYPE_CHECKING:
    from miniphi.engine import SamplingParams
    from miniphi.llm import LLM

__all__ = [
    "DEFAULT_MODEL",
    "KV_TYPES",
    "add_engine_options",
    "add_sampling_options",
    "fetch_default_model",
    "load_llm",
    "positive_int",
    "sampling_params",
    "size_in_bytes",
]

DEFAULT_MODEL = "smollm2-135m-instruct"
# At temperature 1 a model as small as the default one (135 M parameters) wanders off its subject.
DEFAULT_TEMPERATURE = 0.2
DEFAULT_TOP_P = 0.9

KV_TYPES = ("f32", "f16", "q8", "q4")
SPECULATIONS = ("auto", "lookup", "off")
ROPE_POLICIES = ("auto", "hf", "short", "long")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def size_in_bytes(text: str) -> int:
    """Read a size such as 512M, 2G or 1.5GiB (powers of 1024) or a plain number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 512M or 2G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def positive_int(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _token_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN_ID=BIAS; write for example 42=-5") from None


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add every field of SamplingParams as an option."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature",
        type=float,
        default=DEFAULT_TEMPERATURE,
        metavar="T",
        help="0 always takes the most probable token (default: %(default)s)",
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K most probable tokens (0: all)")
    group.add_argument(
        "--top-p",
        type=float,
        default=DEFAULT_TOP_P,
        metavar="P",
        help="keep the most probable tokens that have P together (default: %(default)s)",
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P times the most probable one (0: off)"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 discourages (1: off)"
    )
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="A", help="once per token used (0: off)")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="A", help="per use of a token (0: off)")
    group.add_argument(
        "--logit-bias", type=_token_bias, action="append", default=[], metavar="ID=V", help="add V to a token's logit"
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="longest answer in tokens (default: the model's limit)"
    )
    group.add_argument("--min-tokens", type=int, default=0, metavar="N", help="shortest answer in tokens")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    group.add_argument(
        "--stop-token-id", type=int, action="append", default=[], metavar="ID", help="end the answer at this token"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's own end of the answer")
    group.add_argument(
        "--speculate",
        choices=SPECULATIONS,
        default="auto",
        help="guess tokens ahead, from what the prompt and the answer already say (lookup) and with the model that "
        "--draft names (auto): faster, never another answer (default: %(default)s)",
    )
    group.add_argument(
        "--draft", metavar="MODEL", help="a smaller model with the same vocabulary, which guesses tokens ahead"
    )


def sampling_params(args: argparse.Namespace, **more: Any) -> "SamplingParams":
    """Return the sampling options of a command line; a value out of range is a usage error that names it."""
    from miniphi.engine import SamplingParams

    try:
        return SamplingParams(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            presence_penalty=args.presence_penalty,
            frequency_penalty=args.frequency_penalty,
            logit_bias=dict(args.logit_bias),
            seed=args.seed,
            max_tokens=args.max_tokens,
            min_tokens=args.min_tokens,
            stop=tuple(args.stop),
            stop_token_ids=tuple(args.stop_token_id),
            ignore_eos=args.ignore_eos,
            speculate=args.speculate,
            **more,
        )
    except InvalidRequestError as error:
        raise UsageError(str(error)) from error


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add what decides how a model is loaded and run."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--revision", metavar="REV", help="which revision of the model, as in NAME@REV (default: the newest)"
    )
    group.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads to compute with (default: what suits the machine)"
    )
    group.add_argument(
        "--kv",
        choices=KV_TYPES,
        default="f16",
        help="format of the key/value cache; q8 halves its memory, q4 takes a quarter (default: %(default)s)",
    )
    group.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help="tokens of prompt and answer together (default: the model's whole context, or what fits into memory)",
    )
    group.add_argument(
        "--kv-memory", type=size_in_bytes, metavar="SIZE", help="limit the key/value cache, for example 512M or 2G"
    )
    group.add_argument(
        "--rope-policy",
        choices=ROPE_POLICIES,
        default="auto",
        help="LongRoPE factors of a long-context model: by the planned length (auto), as transformers does (hf), "
        "or always one set (default: %(default)s)",
    )
    group.add_argument(
        "--packed-copy",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep a copy of the model in the cache that starts at once, and use it (default: yes; "
        "MINIPHI_PACKED_COPY=0 turns it off for all commands)",
    )


def load_llm(args: argparse.Namespace, **more: Any) -> "LLM":
    """Load the model that a command line names; the default model is fetched first if it is not here yet.

    `more` are options of `miniphi.load` that only one command has.
    """
    from miniphi import llm

    fetch_default_model(args.model, args.revision)
    return llm.load(
        args.model,
        revision=args.revision,
        num_threads=args.threads,
        kv_type=args.kv,
        context=args.context,
        kv_memory_bytes=args.kv_memory,
        rope_policy=args.rope_policy,
        draft=getattr(args, "draft", None),  # commands that only score have no use for one
        packed_copy=args.packed_copy,
        on_notice=notice,
        **more,
    )


def fetch_default_model(name: str, revision: str | None) -> None:
    """Fetch the embedded default model once, if that is what is named and it is not here yet."""
    from miniphi import models

    if name != DEFAULT_MODEL or revision is not None:
        return
    try:
        models.resolve(name)
    except DownloadError:
        notice(f"{name} is not on this machine yet; fetching it once")
        models.pull(name, progress=True)
