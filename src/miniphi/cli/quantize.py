"""`miniphi quantize`: a smaller copy of a model, and the error that it introduces."""

import argparse
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniphi.cli.options import positive_int
from miniphi.cli.terminal import UsageError, notice, print_table, progress_bar, read_text

if TYPE_CHECKING:
    from miniphi.checkpoint import Checkpoint, Prepared, QuantizeReport, TensorReport

__all__ = ["add_arguments", "run"]

_PARTS = 1000  # the bar of the calibration counts in parts of the model
_LAYER = re.compile(r"^model\.layers\.\d+\.|^model\.|\.weight$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("source", metavar="SRC", help="a model's name, a folder with safetensors, or a .gguf file")
    parser.add_argument(
        "destination", metavar="DST", help="what to write: a .gguf file, which llama.cpp opens too, or else a folder"
    )
    parser.add_argument(
        "--type",
        choices=("q8", "q4", "q4m", "q4_0", "iq4_nl"),
        required=True,
        help="q8: 8 bits; q4: 4 bits with embeddings and output in 8, as NL4 in a folder (the smallest and most exact) "
        "and as Q4_0 in a .gguf file; q4m: q4 with 8 bits for some matrices more; q4_0, iq4_nl: 4 bits in that format "
        "of llama.cpp",
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="a text such as the model will read; 4-bit types then keep what the model computes on it, which takes "
        "much longer and is much more exact (- reads standard input)",
    )
    parser.add_argument("--revision", metavar="REV", help="which revision of the source, as in NAME@REV")
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads to compute with (default: all cores)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite DST if it exists")
    parser.add_argument("--json", action="store_true", help="print the report of every tensor as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from miniphi.checkpoint import check_destination, open_checkpoint, quantize_checkpoint
    from miniphi.models import resolve

    destination = Path(args.destination).expanduser()
    if args.calibrate is not None and args.type == "q8":
        raise UsageError("--calibrate is for 4-bit types; 8 bits lose next to nothing without it")
    with open_checkpoint(resolve(args.source, revision=args.revision)) as source:
        check_destination(source, destination, overwrite=args.force)
        prepared = None if args.calibrate is None else _calibrate(source, destination, args)
        with progress_bar("quantize", unit="B") as update:
            total = source.num_bytes

            def show(tensor: "TensorReport", done: float) -> None:
                update(round(done * total), total, _group(tensor.name))

            report = quantize_checkpoint(
                source,
                destination,
                scheme=args.type,
                prepared=prepared,
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


def _calibrate(source: "Checkpoint", destination: Path, args: argparse.Namespace) -> "dict[str, Prepared]":
    from miniphi.checkpoint import resolve_scheme, scheme_format
    from miniphi.llm.load import open_tokenizer
    from miniphi.quantization import calibrate, sample_windows

    tokenizer = open_tokenizer(source)
    bos = tokenizer.bos_token_id if tokenizer.add_bos else None
    windows = sample_windows(tokenizer.encode(read_text(args.calibrate)), bos_token_id=bos)
    scheme = resolve_scheme(args.type, destination)
    num_layers = source.config.num_hidden_layers
    formats = {
        name: scheme_format(scheme, name, len(tensor.shape), num_layers) for name, tensor in source.tensors.items()
    }
    with progress_bar("calibrate", unit="") as update:
        return calibrate(
            source,
            windows,
            formats,
            num_threads=args.threads,
            on_progress=lambda name, done: update(round(done * _PARTS), _PARTS, _group(name)),
        )


def _print_report(report: "QuantizeReport") -> None:
    from miniphi.models import format_bytes

    groups: dict[tuple[str, str, str], list[TensorReport]] = {}
    for tensor in report.tensors:
        key = (_group(tensor.name), tensor.source_format.name, tensor.target_format.name)
        groups.setdefault(key, []).append(tensor)
    calibrated = any(tensor.output_error is not None for tensor in report.tensors)
    rows = [
        [
            *key,
            str(len(tensors)),
            f"{_root_mean_square([tensor.relative_error for tensor in tensors]):.3%}",
            f"{max(tensor.relative_error for tensor in tensors):.3%}",
            f"{max(tensor.max_absolute_error for tensor in tensors):.3g}",
            *([_output_error(tensors)] if calibrated else []),
        ]
        for key, tensors in groups.items()
    ]
    header = ["TENSORS", "FROM", "TO", "COUNT", "ERROR", "WORST", "LARGEST DIFFERENCE"]
    print_table([*header, "IN PRODUCTS"] if calibrated else header, rows)
    print(
        f"\n{format_bytes(report.source_bytes)} -> {format_bytes(report.target_bytes)}, "
        f"{report.bits_per_weight:.2f} bits per weight"
    )
    print("ERROR is relative: the root of the sum of squared differences over that of squared values.")
    if calibrated:
        print("IN PRODUCTS is the same of what the tensors compute on the calibration text.")


def _output_error(tensors: "list[TensorReport]") -> str:
    errors = [tensor.output_error for tensor in tensors if tensor.output_error is not None]
    return f"{_root_mean_square(errors):.3%}" if errors else ""


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
                "output_error": tensor.output_error,
            }
            for tensor in report.tensors
        ],
    }


def _group(name: str) -> str:
    """Return what the tensors of all layers have in common, such as `self_attn.qkv_proj`."""
    return _LAYER.sub("", name)


def _root_mean_square(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
