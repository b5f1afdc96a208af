"""`miniphi bench`: prefill and decode speed, and how much of this machine's limits they use."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from miniphi.cli.options import DEFAULT_MODEL, KV_TYPES, fetch_default_model, positive_int
from miniphi.cli.terminal import notice, print_table
from miniphi.errors import ContextLengthError

if TYPE_CHECKING:
    from miniphi.config import ModelConfig
    from miniphi.engine.program import Program, UnpackedModel
    from miniphi.engine.speed import LazyTensors, SpeedReport

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="a model's name or path (default: %(default)s)"
    )
    model.add_argument(
        "--synthetic", metavar="NAME", help="random weights in the shape of this catalog model: nothing to download"
    )
    parser.add_argument(
        "--type",
        choices=("q4", "q4_0", "q8"),
        default="q4",
        help="format of synthetic weights, as `miniphi quantize` writes a folder (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive_int, metavar="N", help="threads (default: what suits the machine)")
    parser.add_argument("--kv", choices=KV_TYPES, default="f16", help="format of the cache (default: %(default)s)")
    parser.add_argument("--prompt", type=positive_int, default=512, metavar="N", help="prompt tokens (default: 512)")
    parser.add_argument("--tokens", type=positive_int, default=32, metavar="N", help="decoded tokens (default: 32)")
    parser.add_argument(
        "--streams", type=positive_int, default=8, metavar="N", help="sequences decoded together (default: 8)"
    )
    parser.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="take the median of (default: 3)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from miniphi.engine.speed import measure_speed

    program = _program(args)
    report = measure_speed(
        program, prompt_tokens=args.prompt, decode_tokens=args.tokens, streams=args.streams, repeats=args.repeats
    )
    if args.json:
        print(json.dumps({"model": args.synthetic or args.model, "kv": args.kv} | report.to_dict(), indent=2))
    else:
        _print(report)
    return 0


def _program(args: argparse.Namespace) -> "Program":
    """Make the program, with a cache that holds exactly what is measured."""
    from miniphi.engine.batch import KV_BLOCK_SIZE
    from miniphi.engine.program import load_program

    model = _model(args)
    longest = max(args.prompt, KV_BLOCK_SIZE) + args.tokens
    if longest > model.config.max_position_embeddings:
        raise ContextLengthError(
            f"--prompt {args.prompt} and --tokens {args.tokens} need a context of {longest} tokens; "
            f"this model's is {model.config.max_position_embeddings}"
        )
    if args.synthetic:
        notice(f"making random {args.type} weights in the shape of {args.synthetic} ...")
    return load_program(
        model,
        num_kv_blocks=-(-longest // KV_BLOCK_SIZE) + args.streams * -(-(KV_BLOCK_SIZE + args.tokens) // KV_BLOCK_SIZE),
        kv_type=args.kv,
        num_threads=args.threads,
        max_batch_tokens=max(512, args.streams),
        max_logit_rows=args.streams,
    )


@dataclass(frozen=True, kw_only=True)
class _SyntheticModel:
    config: "ModelConfig"
    tensors: "LazyTensors"

    @property
    def num_bytes(self) -> int:
        return self.tensors.num_bytes


def _model(args: argparse.Namespace) -> "UnpackedModel":
    from miniphi.checkpoint import open_checkpoint, resolve_scheme, synthetic_tensors
    from miniphi.engine.speed import LazyTensors
    from miniphi.models import find_entry, resolve

    if args.synthetic:
        config = find_entry(args.synthetic).model_config()
        scheme = resolve_scheme(args.type, Path(args.synthetic))
        return _SyntheticModel(config=config, tensors=LazyTensors(synthetic_tensors(config, scheme=scheme)))
    fetch_default_model(args.model, None)
    return open_checkpoint(resolve(args.model))


def _print(report: "SpeedReport") -> None:
    from miniphi.engine.speed import INT8_RATE, READ_BANDWIDTH

    print(f"{report.isa}, {report.num_threads} threads, weights {report.weight_bytes / 1e9:.2f} GB")
    print(
        f"this machine just now: {report.int8_ops_per_s / 1e9:.0f} int8 Gop/s, "
        f"{report.read_bytes_per_s / 1e9:.1f} GB/s read"
    )
    prefill = "" if report.prefill_fraction is None else f"{report.prefill_fraction:.0%} of the {INT8_RATE}"
    rows = [
        (f"prefill of {report.prompt_tokens}", f"{report.prefill_tokens_per_s:.1f}", prefill),
        (
            f"decode at depth {report.decode_depth}",
            f"{report.decode_tokens_per_s:.1f}",
            f"{report.decode_fraction:.0%} of the {READ_BANDWIDTH}",
        ),
        (
            f"{report.streams} streams together",
            f"{report.streams_tokens_per_s:.1f}",
            f"{report.streams_fraction:.0%} of the {report.streams_limit}",
        ),
    ]
    print_table(("work", "tokens/s", "share of the limit"), rows)
