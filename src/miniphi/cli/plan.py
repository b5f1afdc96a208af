"""`miniphi plan`: whether a model fits into this machine's memory, and with which context."""

import argparse
import json
from typing import TYPE_CHECKING

from miniphi.cli.options import DEFAULT_MODEL, KV_TYPES, positive_int, size_in_bytes

if TYPE_CHECKING:
    from miniphi.config import ModelConfig

__all__ = ["add_arguments", "run"]

# What the files of the hub hold: 16-bit numbers.
HUB_BITS_PER_WEIGHT = 16.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="a model's name or path (default: %(default)s)"
    )
    parser.add_argument("--revision", metavar="REV", help="which revision of the model, as in NAME@REV")
    parser.add_argument(
        "--context", type=positive_int, metavar="N", help="tokens of prompt and answer (default: the model's limit)"
    )
    parser.add_argument(
        "--kv",
        choices=KV_TYPES,
        default="f16",
        help="format of the key/value cache (default: %(default)s)",
    )
    parser.add_argument(
        "--sequences", type=positive_int, default=1, metavar="N", help="answers at the same time (default: %(default)s)"
    )
    parser.add_argument(
        "--bits",
        type=float,
        metavar="B",
        help="bits per weight, for example 4.5 for q4 (default: the model's files, or what would be fetched)",
    )
    parser.add_argument(
        "--memory", type=size_in_bytes, metavar="SIZE", help="plan for this much memory instead of what is free here"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; a plan that does not fit is an error after its numbers."""
    from miniphi.models import plan_memory

    config, weight_bytes, bits = _model(args.model, args.revision)
    if args.bits is not None:
        weight_bytes, bits = None, args.bits
    plan = plan_memory(
        config,
        context=config.max_position_embeddings if args.context is None else args.context,
        kv_type=args.kv,
        weight_bytes=weight_bytes,
        bits_per_weight=bits,
        sequences=args.sequences,
        available_bytes=args.memory,
    )
    if args.json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        print("\n".join(plan.explain() if plan.fits else plan.explain()[:-1]))
    plan.require_fit()
    return 0


def _model(name: str, revision: str | None) -> "tuple[ModelConfig, int | None, float | None]":
    """Return the configuration, and the weights' size as bytes (from files) or bits per weight (from the catalog)."""
    from miniphi.errors import DownloadError
    from miniphi.models import WheelSource, catalog, find_entry, resolve

    try:
        path = resolve(name, revision=revision)
    except DownloadError:
        if name.partition("@")[0] not in catalog():
            raise
        entry = find_entry(name, revision)
        if isinstance(entry.source, WheelSource):
            return entry.model_config(), entry.source.member_bytes, None
        return entry.model_config(), None, HUB_BITS_PER_WEIGHT

    from miniphi.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return checkpoint.config, checkpoint.num_bytes, None
