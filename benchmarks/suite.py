"""miniphi and every peer that is installed, in turn on the same work; the figures of docs/performance.md.

    python -m benchmarks.suite [--quick] [--only WORK ...] [--models NAME ...] [--json FILE]

Prints a table per model with medians, ratios (above 1: miniphi is ahead), the limit that the machine's own bandwidth
and int8 rate set, measured beside every sample, and the share of it that was reached; then one line of JSON. Progress
goes to standard error. Ctrl-C prints what was measured so far. `benchmarks.report` makes the document and its
pictures of the JSON.

Peers: llama.cpp, from the xllamacpp wheel or from LLAMA_CPP_LIBRARY (a libllama.so built for this machine); OpenVINO
GenAI, from this environment or from the one that OPENVINO_PYTHON is the interpreter of.
"""

import argparse
import json
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks.contest import Settings, hold, say
from benchmarks.engines import NAMES, describe_file, find_engines
from benchmarks.plot import draw
from benchmarks.results import OURS, Block, Results, markdown_table, memory_rows, notes, speed_rows
from benchmarks.works import MODELS, WORKS, Work
from miniphi.atomic_write import atomic_file
from miniphi.kernels import default_num_threads, selected_isa

QUICK_REPEATS = 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="NAME")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[work.name for work in WORKS],
        metavar="WORK",
        help=", ".join(w.name for w in WORKS),
    )
    parser.add_argument(
        "--engines", nargs="+", default=list(NAMES), choices=NAMES, metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument("--quick", action="store_true", help=f"the short works only, {QUICK_REPEATS} repeats")
    parser.add_argument("--repeats", type=int, help="samples of each engine (default: 5)")
    parser.add_argument("--minutes", type=float, help="give every row its share of this; a row has at least one sample")
    parser.add_argument("--threads", type=int, default=default_num_threads())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where model files are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="also draw speed.svg and roofline.svg here")
    args = parser.parse_args(argv)
    if args.repeats is None:
        args.repeats = QUICK_REPEATS if args.quick else 5
    if min(args.repeats, args.threads) < 1:
        parser.error("--repeats and --threads are at least 1")
    return args


def rows(args: argparse.Namespace) -> list[tuple[str, Work]]:
    """Return the rows to measure, model by model."""
    return [
        (model, work)
        for model in args.models
        for work in WORKS
        if model in work.models and (work.name in args.only if args.only else work.is_quick or not args.quick)
    ]


def measure(args: argparse.Namespace, results: Results) -> None:
    """Add a block to the results for every row, complete or cut short."""
    found, absent = find_engines()
    engines = {name: engine for name, engine in found.items() if name in args.engines}
    results.engines = {name: engine.version for name, engine in engines.items()}
    results.absent = {name: why for name, why in absent.items() if name in args.engines}
    settings = Settings(num_threads=args.threads, repeats=args.repeats, folder=args.folder)
    todo = rows(args)
    end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    for index, (model, work) in enumerate(todo):
        results.models[model] = {name: describe_file(name, model) for name in engines}
        block = Block(model=model, work=work.name, label=work.label, unit=work.unit)
        results.blocks.append(block)
        say(f"{model}: {work.label}")
        taking_part = {name: engine for name, engine in engines.items() if name == OURS or not work.is_ours_only}
        share = (end - time.monotonic()) / (len(todo) - index)
        hold(block, work, taking_part, settings, time.monotonic() + share)


def show(results: Results) -> None:
    """Print the tables."""
    engines = "; ".join(f"{name} {version}" for name, version in results.engines.items())
    print(f"{results.processor}, {results.num_threads} threads; {engines}")
    for model in dict.fromkeys(block.model for block in results.blocks):
        print(f"\n{model}\n\n{markdown_table(speed_rows(results, model))}")
        memory = memory_rows(results, model)
        if len(memory) > 1:
            print(f"\n{markdown_table(memory)}")
        for line in notes(results, model):
            print(line)
    limits = [
        limits for block in results.blocks for sample in block.samples for limits in (sample.before, sample.after)
    ]
    if limits:
        ops = [limit.int8_ops_per_s / 1e9 for limit in limits]
        read = [limit.read_bytes_per_s / 1e9 for limit in limits]
        print(f"\nThe machine: {min(ops):.0f}-{max(ops):.0f} int8 Gop/s, {min(read):.1f}-{max(read):.1f} GB/s read")


def processor() -> str:
    """Return what the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = Results(
        date=date.today().isoformat(),
        processor=processor(),
        isa=selected_isa(),
        num_threads=args.threads,
        engines={},
        absent={},
    )
    status = 0
    try:
        measure(args, results)
    except KeyboardInterrupt:
        say("interrupted; this is what was measured")
        status = 130
    show(results)
    line = json.dumps(results.to_dict())
    print(line)
    if args.json:
        with atomic_file(args.json, overwrite=True) as file:
            file.write((line + "\n").encode())
    if args.plot:
        for path in draw(results, args.plot):
            say(f"drawn: {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
