"""miniphi and llama.cpp in turn, A B A B, on the same file: `prefill.py` and `decode.py` are views of this.

    python -m benchmarks.side_by_side [--models NAME ...] [--work prefill decode streams] [--repeats 5]

Prints one table of medians with the ratio, the machine's limits measured in the same run, and one JSON line.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.llama_cpp import library_path
from benchmarks.runners import STREAM_DEPTH, Miniphi, Peer, Runner, model_file
from miniphi.kernels import default_num_threads, measure_machine

MODELS = ("smollm2-135m-instruct", "phi-3-mini-128k-instruct")
PAUSE_S = 0.3
"""Between two measurements, so that one engine's waiting threads are asleep when the other starts."""


def works(args: argparse.Namespace) -> dict[str, Callable[[Runner], float]]:
    """Return what is timed, by name."""
    everything: dict[str, tuple[str, Callable[[Runner], float]]] = {
        "prefill": (f"prefill {args.prompt}", lambda runner: runner.prefill(args.prompt)),
        "decode": (f"decode at {args.depth}", lambda runner: runner.decode(args.depth, args.tokens, 1)),
        "streams": (
            f"decode, {args.streams} streams",
            lambda runner: runner.decode(STREAM_DEPTH, args.tokens, args.streams),
        ),
    }
    return dict(everything[name] for name in args.work)


def measure(model: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Time every kind of work on one model; return one record each."""
    path = model_file(model, args.folder)
    context = max(args.prompt, args.depth + args.tokens) + args.streams * (STREAM_DEPTH + args.tokens + 32)
    ours = Miniphi(path, num_threads=args.threads, context=context)
    streams = args.streams
    vocab_size = ours.config.vocab_size
    theirs = Peer(path, vocab_size=vocab_size, num_threads=args.threads, context=context * streams, streams=streams)
    records = []
    for label, work in works(args).items():
        speeds: dict[str, list[float]] = {ours.name: [], theirs.name: []}
        for repeat in range(args.repeats + 1):
            for runner in (ours, theirs):
                time.sleep(PAUSE_S)
                speed = work(runner)
                if repeat > 0:  # the first round warms caches and clocks
                    speeds[runner.name].append(speed)
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        records.append({"model": model, "work": label, "ratio": medians[ours.name] / medians[theirs.name]} | medians)
        print(
            f"{model:26} {label:18} {medians[ours.name]:9.1f} {medians[theirs.name]:11.1f} {records[-1]['ratio']:7.2f}",
            flush=True,
        )
    return records


def main(argv: Sequence[str] | None = None, *, work: Sequence[str] = ("prefill", "decode", "streams")) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--work", nargs="+", default=list(work), choices=("prefill", "decode", "streams"))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--depth", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_num_threads())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where synthetic models go")
    args = parser.parse_args(argv)
    before = measure_machine(num_threads=args.threads)
    print(f"llama.cpp: {library_path().name}; {args.threads} threads; tokens/s, medians of {args.repeats}")
    print(f"{'model':26} {'work':18} {'miniphi':>9} {'llama.cpp':>11} {'ratio':>7}")
    records = [record for model in args.models for record in measure(model, args)]
    limits = [before, measure_machine(num_threads=args.threads)]
    for when, limit in zip(("before", "after"), limits, strict=True):
        print(f"limits {when}: {limit.int8_ops_per_s / 1e9:.0f} int8 Gop/s, {limit.read_bytes_per_s / 1e9:.1f} GB/s")
    print(json.dumps({"limits": [vars(limit) for limit in limits], "records": records}))


if __name__ == "__main__":
    sys.exit(main())
