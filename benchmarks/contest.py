"""Engines in turn on one work: A B C A B C, with the machine's limits measured between any two.

Knows how to take samples and when to stop; not what they mean.
"""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines import Engine, Variant, model_config
from benchmarks.limits import Limits
from benchmarks.results import Block, Sample
from benchmarks.worker import Worker, WorkerError
from benchmarks.works import Work
from miniphi.errors import MiniphiError
from miniphi.kernels import Meter
from miniphi.models import machine_memory

PAUSE_S = 0.3
"""Before every measurement, so that the threads of the engine before are asleep."""

_WARM_TOKENS = {"prefill": 512, "decode": 2}
"""What a process does before it is timed, at the depth of its work"""

_SPARE_BYTES = 1 << 30
_COMMAND_PROMPT = "Tell me a story."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What holds for a whole run."""

    num_threads: int
    repeats: int
    folder: Path


@dataclass(frozen=True, kw_only=True)
class _Contender:
    engine: Engine
    variant: Variant
    path: Path
    num_bytes: float
    """that a process of it will take, about"""

    @property
    def key(self) -> str:
        return _key(self.engine, self.variant)


class _Workers:
    """The processes that are alive. Where memory is short, the one that waited longest makes room for another."""

    def __init__(self, work: Work, num_threads: int) -> None:
        self._work, self._num_threads = work, num_threads
        self._alive: dict[str, Worker] = {}

    def get(self, contender: _Contender) -> Worker:
        """Return an engine's process; a new one has done a little of the work, so that its caches are warm."""
        worker = self._alive.pop(contender.key, None)
        if worker is None:
            while self._alive and machine_memory().available_bytes < contender.num_bytes + _SPARE_BYTES:
                longest = next(iter(self._alive))
                say(f"  ending {longest}: memory is short")
                self._alive.pop(longest).close()
            worker = start_worker(contender.engine, contender.path, self._work, contender.variant, self._num_threads)
            self._alive[contender.key] = worker
            ask(worker, self._work, min(self._work.num_tokens, _WARM_TOKENS[self._work.kind]))
        self._alive[contender.key] = worker
        return worker

    def close(self, key: str) -> None:
        worker = self._alive.pop(key, None)
        if worker is not None:
            worker.close()

    def close_all(self) -> None:
        for worker in self._alive.values():
            worker.close()
        self._alive.clear()


def start_worker(engine: Engine, path: Path, work: Work, variant: Variant, num_threads: int) -> Worker:
    """Start a process of an engine, made for one work."""
    options = {"model": str(path), "num_threads": num_threads, "context": work.context, "streams": work.streams}
    options |= {"cache": work.cache, "is_deep": work.is_deep} | dict(variant)
    return Worker(engine.python, engine.runner, options)


def ask(worker: Worker, work: Work, num_tokens: int) -> tuple[float, int]:
    """Return the speed of a work, or of a shorter one of its kind, and the peak memory of the process."""
    if work.kind == "prefill":
        return worker.ask("prefill", num_tokens=num_tokens)
    return worker.ask("decode", depth=work.depth, num_tokens=num_tokens, streams=work.streams)


def hold(block: Block, work: Work, engines: Mapping[str, Engine], settings: Settings, deadline: float) -> None:
    """Fill a block with `repeats` times the work's slices of each engine, or fewer if the next would pass the deadline.

    Every engine is tried once, which warms caches and clocks and chooses its settings; then come the rounds.
    """
    workers = _Workers(work, settings.num_threads)
    try:
        contenders = [
            best for engine in engines.values() if (best := _choose(block, work, engine, settings, workers)) is not None
        ]
        meter = Meter(num_threads=settings.num_threads)
        before = _calibrate(meter)
        rounds = settings.repeats * work.slices
        for done in range(rounds):
            started = time.monotonic()
            for contender in list(contenders):
                try:
                    value, peak = _measure(contender, work, workers, settings)
                except WorkerError as error:
                    block.missing[contender.engine.name] = str(error)
                    contenders.remove(contender)
                    workers.close(contender.key)
                    continue
                after = _calibrate(meter)
                block.samples.append(
                    Sample(engine=contender.engine.name, value=value, before=before, after=after, peak_bytes=peak)
                )
                say(
                    f"  {done + 1}/{rounds} {contender.engine.name:10} {value:10.2f} {block.unit}   "
                    f"{before.read_bytes_per_s / 1e9:.0f} and {after.read_bytes_per_s / 1e9:.0f} GB/s"
                )
                before = after
            if time.monotonic() + (time.monotonic() - started) > deadline:
                break
    finally:
        workers.close_all()


def _choose(block: Block, work: Work, engine: Engine, settings: Settings, workers: _Workers) -> _Contender | None:
    """Try an engine's settings, note what a step needs with the fastest, and return it; None if all of them fail."""
    config = model_config(block.model)
    best: tuple[float, _Contender] | None = None
    variants = engine.variants(work, settings.folder)
    for variant in variants:
        try:
            contender = _contender(engine, variant, block.model, work, settings)
            value = _try(contender, work, workers, settings, is_only=len(variants) == 1)
        except (WorkerError, MiniphiError, subprocess.CalledProcessError) as error:
            block.missing[engine.name] = str(error)
            workers.close(_key(engine, variant))
            continue
        rank = -value if block.unit == "s" else value
        if best is None or rank > best[0]:
            if best is not None:
                workers.close(best[1].key)
            best = (rank, contender)
        else:
            workers.close(contender.key)
    if best is None:
        return None
    block.missing.pop(engine.name, None)
    chosen = best[1]
    if len(variants) > 1:
        block.variants[engine.name] = _in_words(chosen.variant)
    demand = engine.demand(work, config, chosen.path, chosen.variant)
    if demand is not None:
        block.demands[engine.name] = demand
    return chosen


def _contender(engine: Engine, variant: Variant, model: str, work: Work, settings: Settings) -> _Contender:
    path = engine.model_file(model, settings.folder)
    config = model_config(model)
    cached = work.streams * work.context * config.kv_values_per_token
    num_bytes = _size(path) + cached * engine.kv_value_bytes(work, config, variant)
    return _Contender(engine=engine, variant=variant, path=path, num_bytes=num_bytes)


def _try(contender: _Contender, work: Work, workers: _Workers, settings: Settings, *, is_only: bool) -> float:
    """Return a first figure of an engine with some settings, whose only use is to choose among several."""
    if work.kind == "start":  # the page cache, and what an engine keeps of its first start
        _measure(contender, work, workers, settings)
    elif is_only and work.kind != "command":
        workers.get(contender)
        say(f"  ready {contender.key}")
        return 0.0
    value, _ = _measure(contender, work, workers, settings)
    say(f"  tried {contender.key:40} {value:10.2f} {work.unit}")
    return value


def _measure(contender: _Contender, work: Work, workers: _Workers, settings: Settings) -> tuple[float, int]:
    """Return one figure in the work's unit, and the peak memory of the process that gave it."""
    time.sleep(PAUSE_S)
    if work.kind == "command":
        return _time_command(), 0
    if work.kind == "start":
        return _time_start(contender, work, settings)
    return ask(workers.get(contender), work, work.num_tokens)


def _time_start(contender: _Contender, work: Work, settings: Settings) -> tuple[float, int]:
    start = time.perf_counter()
    worker = start_worker(contender.engine, contender.path, work, contender.variant, settings.num_threads)
    try:
        _, peak = worker.ask("prefill", num_tokens=work.num_tokens)
        return time.perf_counter() - start, peak
    finally:
        worker.close()


def _time_command() -> float:
    """Return the seconds that a user waits for the first character of the default model's answer."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "miniphi", "generate", _COMMAND_PROMPT, "--max-tokens", "20"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        errors = process.stderr.read().decode(errors="replace").strip()
    if not first:
        raise WorkerError(f"miniphi generate printed nothing: {errors}")
    return seconds


def _calibrate(meter: Meter) -> Limits:
    machine = meter.measure()
    return Limits(int8_ops_per_s=machine.int8_ops_per_s, read_bytes_per_s=machine.read_bytes_per_s)


def _size(path: Path) -> int:
    files: Sequence[Path] = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _key(engine: Engine, variant: Variant) -> str:
    return f"{engine.name} {_in_words(variant)}"


def _in_words(variant: Variant) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {'kept' if name in ('compiled', 'packed_copy') else value}"
        for name, value in variant.items()
    )


def say(text: str) -> None:
    """Tell how far it is, on standard error."""
    print(text, file=sys.stderr, flush=True)
