"""`miniphi quantize`: a smaller copy of a model, and the error that it introduces."""

import argparse
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniphi.cli.options import positive_int
from miniphi.cli.terminal import notice, print_table, progress_bar

if TYPE_CHECKING:
    from miniphi.checkpoint import QuantizeReport, TensorReport

__all__ = ["add_arguments", "run"]

_LAYER = re.compile(r"^model\.layers\.\d+\.|^model\.|\.weight$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("source", metavar="SRC", help="a model's name, a folder with safetensors, or a .gguf file")
    parser.add_argument("destination", metavar="DST", help="the .gguf file to write")
    parser.add_argument(
        "--type", choices=("q8", "q4"), required=True, help="8 bits, or 4 bits with embeddings and output in 8"
    )
    parser.add_argument("--revision", metavar="REV", help="which revision of the source, as in NAME@REV")
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads to compute with (default: all cores)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite DST if it exists")
    parser.add_argument("--json", action="store_true", help="print the report of every tensor as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from miniphi.checkpoint import open_checkpoint, quantize_checkpoint
    from miniphi.models import resolve

    destination = Path(args.destination).expanduser()
    with (
        open_checkpoint(resolve(args.source, revision=args.revision)) as source,
        progress_bar("quantize", unit="B") as update,
    ):
        total = source.num_bytes

        def show(tensor: "TensorReport", done: float) -> None:
            update(round(done * total), total, _group(tensor.name))

        report = quantize_checkpoint(
            source,
            destination,
            scheme=args.type,
            overwrite=args.force,
            num_threads=args.threads,
            on_progress=show,
        )
    if args.json:
        print(json.dumps(_as_json(report, destination), indent=2))
    else:
        _print_report(report)
        notice(f"written to {destination}")
    return 0


def _print_report(report: "QuantizeReport") -> None:
    from miniphi.models import format_bytes

    groups: dict[tuple[str, str, str], list[TensorReport]] = {}
    for tensor in report.tensors:
        key = (_group(tensor.name), tensor.source_format.name, tensor.target_format.name)
        groups.setdefault(key, []).append(tensor)
    rows = [
        [
            *key,
            str(len(tensors)),
            f"{_root_mean_square([tensor.relative_error for tensor in tensors]):.3%}",
            f"{max(tensor.relative_error for tensor in tensors):.3%}",
            f"{max(tensor.max_absolute_error for tensor in tensors):.3g}",
        ]
        for key, tensors in groups.items()
    ]
    print_table(["TENSORS", "FROM", "TO", "COUNT", "ERROR", "WORST", "LARGEST DIFFERENCE"], rows)
    print(
        f"\n{format_bytes(report.source_bytes)} -> {format_bytes(report.target_bytes)}, "
        f"{report.bits_per_weight:.2f} bits per weight"
    )
    print("ERROR is relative: the root of the sum of squared differences over that of squared values.")


def _as_json(report: "QuantizeReport", destination: Path) -> dict[str, Any]:
    return {
        "path": str(destination),
        "source_bytes": report.source_bytes,
        "target_bytes": report.target_bytes,
        "bits_per_weight": report.bits_per_weight,
        "tensors": [
            {
                "name": tensor.name,
                "source_format": tensor.source_format.name,
                "target_format": tensor.target_format.name,
                "relative_error": tensor.relative_error,
                "max_absolute_error": tensor.max_absolute_error,
            }
            for tensor in report.tensors
        ],
    }


def _group(name: str) -> str:
    """Return what the tensors of all layers have in common, such as `self_attn.qkv_proj`."""
    return _LAYER.sub("", name)


def _root_mean_square(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
