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
from miniphi.kernels import measure_machine
from miniphi.models import machine_memory

PAUSE_S = 0.3
"""Before every measurement, so that the threads of the engine before are asleep."""

_TRIAL_TOKENS = 2
"""Decoded to warm up and to choose among an engine's settings"""

_CALIBRATION_BYTES = 1 << 28  # per thread
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
        return f"{self.engine.name} {_in_words(self.variant)}"


class _Workers:
    """The processes that are alive. Where memory is short, the one that waited longest makes room for another."""

    def __init__(self, work: Work, num_threads: int) -> None:
        self._work, self._num_threads = work, num_threads
        self._alive: dict[str, Worker] = {}

    def get(self, contender: _Contender) -> Worker:
        worker = self._alive.pop(contender.key, None)
        if worker is None:
            while self._alive and machine_memory().available_bytes < contender.num_bytes + _SPARE_BYTES:
                longest = next(iter(self._alive))
                say(f"  ending {longest}: memory is short")
                self._alive.pop(longest).close()
            worker = start_worker(contender.engine, contender.path, self._work, contender.variant, self._num_threads)
        self._alive[contender.key] = worker
        return worker

    def close(self, contender: _Contender) -> None:
        worker = self._alive.pop(contender.key, None)
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


def hold(block: Block, work: Work, engines: Mapping[str, Engine], settings: Settings, deadline: float) -> None:
    """Fill a block with samples, `repeats` of each engine, or fewer if the next round would pass the deadline.

    Every engine is tried once, which warms caches and clocks and chooses its settings; then come the rounds.
    """
    workers = _Workers(work, settings.num_threads)
    try:
        contenders = [
            best for engine in engines.values() if (best := _choose(block, work, engine, settings, workers)) is not None
        ]
        before = _calibrate(settings)
        for repeat in range(settings.repeats):
            started = time.monotonic()
            for contender in list(contenders):
                try:
                    value, peak = _measure(contender, work, workers, settings)
                except WorkerError as error:
                    block.missing[contender.engine.name] = str(error)
                    contenders.remove(contender)
                    continue
                after = _calibrate(settings)
                block.samples.append(
                    Sample(engine=contender.engine.name, value=value, before=before, after=after, peak_bytes=peak)
                )
                say(
                    f"  {repeat + 1}/{settings.repeats} {contender.engine.name:10} {value:10.2f} {block.unit}   "
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
            path = engine.model_file(block.model, settings.folder)
            cache_bytes = work.streams * work.context * config.kv_values_per_token
            contender = _Contender(
                engine=engine,
                variant=variant,
                path=path,
                num_bytes=_size(path) + cache_bytes * engine.kv_value_bytes(work, config, variant),
            )
            if work.kind == "start":  # the page cache, and what an engine keeps from its first start
                _measure(contender, work, workers, settings)
            value, _ = _measure(contender, work, workers, settings, is_trial=len(variants) == 1)
        except (WorkerError, MiniphiError, subprocess.CalledProcessError) as error:
            block.missing[engine.name] = str(error)
            continue
        say(f"  trial {contender.key:40} {value:10.2f} {block.unit}")
        rank = -value if block.unit == "s" else value
        if best is None or rank > best[0]:
            if best is not None:
                workers.close(best[1])
            best = (rank, contender)
        else:
            workers.close(contender)
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


def _measure(
    contender: _Contender, work: Work, workers: _Workers, settings: Settings, *, is_trial: bool = False
) -> tuple[float, int]:
    """Return one figure in the work's unit, and the peak memory of the process that gave it."""
    time.sleep(PAUSE_S)
    if work.kind == "command":
        return _time_command(), 0
    if work.kind == "start":
        return _time_start(contender, work, settings)
    worker = workers.get(contender)
    try:
        if work.kind == "prefill":
            return worker.ask("prefill", num_tokens=min(512, work.num_tokens) if is_trial else work.num_tokens)
        num_tokens = _TRIAL_TOKENS if is_trial else work.num_tokens
        return worker.ask("decode", depth=work.depth, num_tokens=num_tokens, streams=work.streams)
    except WorkerError:
        workers.close(contender)
        raise


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


def _calibrate(settings: Settings) -> Limits:
    machine = measure_machine(num_threads=settings.num_threads, bytes_per_thread=_CALIBRATION_BYTES, repeats=2)
    return Limits(int8_ops_per_s=machine.int8_ops_per_s, read_bytes_per_s=machine.read_bytes_per_s)


def _size(path: Path) -> int:
    files: Sequence[Path] = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _in_words(variant: Variant) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {'kept' if name == 'compiled' else value}" for name, value in variant.items()
    )


def say(text: str) -> None:
    """Tell how far it is, on standard error."""
    print(text, file=sys.stderr, flush=True)
